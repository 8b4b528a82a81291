"""A Python environment of a test's own: what is installed here is importable there, but no `.pth` file of ours runs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Environment:
    """A virtual environment that sees the packages of the one that the tests run in, after its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.site = Path(self.output("import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        # A path alone: what Python does at its start in the outer environment is not done in this one.
        (self.site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def pip(self, *arguments: str | Path) -> None:
        """The outer environment's pip, at work in this one, with no network."""
        settings = ("--no-deps", "--no-build-isolation", "--no-index") if arguments[0] == "install" else ("--yes",)
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            "--disable-pip-version-check",
            "-q",
        ]
        done = self._run([*command, *arguments, *settings])
        assert done.returncode == 0, done.stderr

    def output(self, code: str, *arguments: str | Path, **variables: str) -> str:
        """What a program prints; it is to succeed."""
        done = self.run("-c", code, *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return self._run([self.python, *arguments], **variables)

    def _run(self, command: list[str | Path], **variables: str) -> subprocess.CompletedProcess[str]:
        ours = ("PYTHONPATH", "UNIERASE_AUTOLOAD", "UNIERASE_PLUGINS")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        return subprocess.run(
            [str(part) for part in command],
            env={**environment, "COLUMNS": "300", **variables},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
