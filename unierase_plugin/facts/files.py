"""Facts from .json, .jsonl and .csv files. Each record comes with its place: file and line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import RequestError, did_you_mean, first_words, shown
from ..storage.inputs import checked_path, parse_json, read_text
from .records import Located, build_requests
from .request import ForgetRequest

FILE_SUFFIXES = (".json", ".jsonl", ".csv")


def read_file(path: str | os.PathLike[str]) -> tuple[ForgetRequest, ...]:
    """Reads requests from a .json (a list, or JSON lines), .jsonl or .csv file."""
    return build_requests(iter_records(path), Path(path).stem)


def iter_records(path: str | os.PathLike[str]) -> Iterator[Located]:
    """Yields the records of a file with their places. The fields are not checked.

    Raises `RequestError` if the file does not exist, if its suffix is not one of `FILE_SUFFIXES`, or if it cannot be
    parsed.
    """
    path = checked_path(path, RequestError)
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise unknown_format(str(path))
    try:
        text = read_text(path, RequestError)
    except FileNotFoundError:
        siblings = [each.name for each in path.parent.glob("*") if each.suffix.lower() in FILE_SUFFIXES]
        raise RequestError(
            f"There is no file {shown(str(path))}.{did_you_mean(path.name, siblings)} "
            f"Relative paths start at {str(Path.cwd())!r}."
        ) from None
    if path.suffix.lower() == ".csv":
        return _csv_records(path, text)
    return _json_list_records(path, text) if text.lstrip().startswith("[") else _json_line_records(path, text)


def unknown_format(path: str, alternative: str = "") -> RequestError:
    """The error for a path whose suffix is not one of `FILE_SUFFIXES`."""
    return RequestError(
        f"Cannot tell the format of {shown(path)}: give a path that ends in {', '.join(FILE_SUFFIXES)}{alternative}."
    )


def _json_list_records(path: Path, text: str) -> Iterator[Located]:
    for number, record in enumerate(_parse_json(path, text, 1), start=1):
        yield f"{path}, item {number}", record


def _json_line_records(path: Path, text: str) -> Iterator[Located]:
    # Not splitlines(): JSON strings may have U+2028 and similar characters unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parse_json(path, line, number)


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    return parse_json(
        text, str(path), RequestError, " Expected a list of objects, or one object on each line.", first_line
    )


def _csv_records(path: Path, text: str) -> Iterator[Located]:
    """Rows are numbered as in a spreadsheet: the header is row 1. Empty cells count as absent."""
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number = 0
    try:
        names = rows.fieldnames or ()
        twice = [name for index, name in enumerate(names) if name and name in names[:index]]
        if twice:
            raise RequestError(f"{path}, row 1: two columns are called {shown(twice[0])}. Rename one of them.")
        number = 1
        for number, row in enumerate(rows, start=2):
            if None in row:
                raise RequestError(
                    f"{path}, row {number}: there are more cells than columns ({first_words(row[None][0])} is left "
                    "over). Put cells that hold commas in quotes."
                )
            yield f"{path}, row {number}", {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise RequestError(f"{path}, row {number + 1}: malformed CSV ({error}).") from error
