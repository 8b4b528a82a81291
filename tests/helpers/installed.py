"""Plugins in packages of their own, found by their entry points as installed ones are."""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from unierase_plugin.plugins import hookspecs, registration
from unierase_plugin.plugins.catalogue import RESTRICTION

Install = Callable[..., None]


def installer(place: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(name, code, package, version)`: puts a package with one entry point on the path, as pip would."""
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delenv(RESTRICTION, raising=False)

    def install(name: str, code: str, package: str = "", version: str = "1.2") -> None:
        package = package or f"{name}-package"
        module = f"{package.replace('-', '_')}_code"
        (place / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        record = place / f"{package.replace('-', '_')}-{version}.dist-info"
        record.mkdir(exist_ok=True)  # its code alone may be another
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (record / "entry_points.txt").write_text(f"[{hookspecs.PROJECT}]\n{name} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
        forget()

    def forget() -> None:
        """What is registered is found anew, now and after the test."""
        monkeypatch.setattr(registration, "_registry", functools.cache(registration.load_registry))

    forget()
    return install
