"""Reads facts from every source: TOFU, RETURN, CounterFact, zsRE, JSON, JSON lines and CSV.

Every caller reads facts with `read_requests`. The part of a spec before the colon picks a reader from a mapping that
the caller passes, so a plugin adds a reader without a change here. An error names the file and the line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError, did_you_mean, first_words, shown
from ..storage.inputs import checked_path
from .benchmarks import BESIDE, READERS
from .files import FILE_SUFFIXES, read_file, unknown_format
from .records import AT_HAND, PREFIX, Reader, Record, build_requests, with_case_ids, with_extras
from .request import ForgetRequest

_SLICE = re.compile(r"\[(-?\d{1,18}|):(-?\d{1,18}|)\]$")
_PREFIX = re.compile(rf"({PREFIX.pattern}):(.*)", re.DOTALL)

#: The forms in which a caller may give facts.
Requests = str | os.PathLike[str] | Iterable[ForgetRequest | Mapping[str, Any]]


def read_requests(
    spec: str | os.PathLike[str] | Iterable[ForgetRequest | Record],
    readers: Mapping[str, Reader] | None = None,
    *,
    extras: bool = False,
) -> tuple[ForgetRequest, ...]:
    """Reads the requests that `spec` names, in order. A subject that is not given stays None.

    `spec` is a string such as `tofu:forget01`, `return:forget`, `counterfact:FILE`, `counterfact:hub`, `zsre:FILE` or
    `facts.csv`. Each may end with a slice (`tofu:forget10[:20]`, `[20:40]`, `[-5:]`). It may also be a path object, or
    a list of requests or of mappings with their fields. `readers` (default `READERS`) maps the part before the colon to
    a function. A missing `case_id` becomes `<file stem or split>-<index>`, counted before slicing.

    Paraphrases and wrong answers are read from the records. `extras` also reads them from the files of their own in
    which some benchmarks keep them (`benchmarks.BESIDE`).

    Raises `RequestError` if a name, file, line, field or slice is not usable, and if nothing is left to return.
    """
    if isinstance(spec, (ForgetRequest, Mapping, bytes)) or not isinstance(spec, (str, os.PathLike, Iterable)):
        raise RequestError(
            f"Expected a spec, a path or a list of requests, got {first_words(spec)}. Put a single request in a list."
        )
    if isinstance(spec, str):
        requests = _read_spec(spec, READERS if readers is None else readers, extras)
    elif isinstance(spec, os.PathLike):
        requests = _read_path(os.fspath(spec), READERS if readers is None else readers)
    else:
        requests = build_requests(((f"{AT_HAND} {i}", each) for i, each in enumerate(spec)), stem="request")
    if not requests:
        raise RequestError(f"{shown(spec)} holds no requests.")
    return requests


def _read_spec(spec: str, readers: Mapping[str, Reader], extras: bool) -> tuple[ForgetRequest, ...]:
    source, bounds = _split_slice(spec.strip())
    prefixed = _PREFIX.fullmatch(source)
    if prefixed is None or prefixed[1] not in readers:
        checked_path(source, RequestError)
    if prefixed is None or (prefixed[1] not in readers and Path(source).exists()):
        requests = _read_path(source, readers)
    elif prefixed[1] in readers:
        requests = with_case_ids(readers[prefixed[1]](prefixed[2]), stem=prefixed[1])
    else:
        raise RequestError(
            f"Unknown prefix {shown(prefixed[1])} in the spec {shown(spec)}.{did_you_mean(prefixed[1], readers)} "
            f"Known: {', '.join(sorted(readers))}, or a path that ends in {', '.join(FILE_SUFFIXES)}."
        )
    if requests and not requests[bounds]:
        raise RequestError(f"The slice of {shown(spec)} selects none of its {len(requests)} requests.")
    chosen = requests[bounds]
    beside = BESIDE.get(prefixed[1]) if extras and prefixed is not None else None
    if beside is None or prefixed is None or readers.get(prefixed[1]) is not READERS[prefixed[1]]:
        return chosen
    return with_extras(chosen, beside(prefixed[2]))


def _read_path(path: str, readers: Mapping[str, Reader]) -> tuple[ForgetRequest, ...]:
    if checked_path(path, RequestError).suffix.lower() not in FILE_SUFFIXES:
        raise unknown_format(path, f", or a spec with a prefix ({', '.join(sorted(readers))})")
    return read_file(path)


def _split_slice(spec: str) -> tuple[str, slice]:
    found = _SLICE.search(spec)
    if found:
        start, stop = (int(bound) if bound else None for bound in found.groups())
        return spec[: found.start()], slice(start, stop)
    if spec.endswith("]") and not checked_path(spec, RequestError).exists():
        raise RequestError(f"The slice at the end of {shown(spec)} is not [start:stop]. Write [0:20], [:20] or [-5:].")
    return spec, slice(None)


def spec_path(spec: Any) -> Path | None:
    """The file or folder that a spec, a model or a setting names, without prefix and slice. None if it names none."""
    if not isinstance(spec, (str, os.PathLike)):
        return None
    text = _SLICE.sub("", str(spec).strip())
    prefixed = _PREFIX.fullmatch(text)
    names = (str(spec), text, prefixed[2] if prefixed else "")
    return next((Path(name) for name in names if name and os.path.exists(os.path.expanduser(name))), None)
