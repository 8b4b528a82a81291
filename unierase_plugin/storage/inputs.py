"""Reads and parses files and values from users. A refusal is one line that names the file and the line.

Nothing past this module needs to distrust a path, a text file, JSON or YAML: impossible file names, other encodings,
endless numbers, endless nesting and multiplying aliases are refused here.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UniEraseError, did_you_mean, reason, shown

#: Limits for YAML: bytes of a file, and values in it with all aliases expanded. Settings need some thousand of either.
YAML_BYTES = 1 << 20
YAML_VALUES = 20_000

Refusal = type[UniEraseError]

_SPACE = re.compile(r"\s*")


def checked_path(path: str | os.PathLike[str], kind: Refusal = UniEraseError, what: str = "path") -> Path:
    """The path with `~` expanded, if the file system accepts the name and lets it be looked at. It need not exist.

    Raises `kind` for an empty name (it would mean the working folder), a name that is too long or not UTF-8, a loop of
    symbolic links, the home of an unknown user, and a folder that may not be read.
    """
    text = os.fspath(path)
    if not text:
        raise kind(f"The {what} is empty. Give its name; '.' is the working folder.")
    try:
        if "\0" in text:
            raise ValueError("it holds a NUL character")
        text.encode()
        found = Path(text).expanduser()
        found.stat()
    except UnicodeEncodeError:
        raise kind(f"The {what} {shown(text)} is not UTF-8. Rename the file or folder.") from None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            why = (error.strerror or reason(error)).lower()
            raise kind(f"The {what} {shown(text)} cannot be used: {why}. Give another.") from error
    except (ValueError, RuntimeError) as error:
        raise kind(f"The {what} {shown(text)} cannot be used: {reason(error).rstrip('.')}. Give another.") from error
    return found


def absolute_path(path: str | os.PathLike[str], kind: Refusal = UniEraseError) -> Path:
    """`checked_path` as an absolute path, with symbolic links followed."""
    return checked_path(path, kind).resolve()


def no_folder(name: str | os.PathLike[str]) -> str:
    """A sentence and a space: where no such folder is, and what is there instead. "" if the folder exists.

    For messages about a name that may be a folder or an id on the hub, and is neither.
    """
    path = Path(name)
    if path.is_dir():
        return ""
    if path.is_file():
        return f"{shown(str(path))} is a file, not the folder that holds it. "
    try:
        near = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        near = []
    where = "" if path.is_absolute() else f" in {shown(str(Path.cwd()))}"
    return f"There is no folder {shown(str(path))}{where}.{did_you_mean(path.name, near)} "


def read_text(path: Path, kind: Refusal, largest: int | None = None) -> str:
    """The text of a UTF-8 file. Line ends stay; the byte-order mark that spreadsheets write is removed.

    Raises FileNotFoundError, so that the caller can name alternatives. Raises `kind` for everything else, such as a
    file of more than `largest` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read() if largest is None else file.read(largest + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise kind(f"Cannot read {shown(str(path))}: {(error.strerror or reason(error)).lower()}.") from error
    if largest is not None and len(data) > largest:
        raise kind(f"{shown(str(path))} has more than {largest} bytes, which is no file of this sort.")
    return decoded(path, data, kind)


def decoded(path: Path, data: bytes, kind: Refusal, first_line: int = 1) -> str:
    """The bytes of a file, from its line `first_line` on, as text.

    Raises `kind` with the line if they are not UTF-8 or have a NUL character.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise kind(f"{path}, line {first_line}: not UTF-8 text but UTF-16. Save the file as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + first_line
        raise kind(
            f"{path}, line {line}: not UTF-8 text (byte {error.object[error.start]:#04x}). Save the file as UTF-8."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + first_line
        raise kind(f"{path}, line {line}: holds a NUL character. Save the file as UTF-8 text.")
    return text


# --- JSON ------------------------------------------------------------------------------------------------------------


class _NotUsableError(ValueError):
    """JSON that Python accepts and this package refuses."""


def parse_json(text: str, where: str, kind: Refusal, expected: str = "", first_line: int = 1, nan: bool = False) -> Any:
    """The value of a JSON text. `where` is its file; `first_line` is the line of the file at which the text begins.

    Raises `kind` for malformed JSON, with `expected` as the remedy, and for what Python's parser accepts or fails on:
    NaN and infinities, numbers of thousands of digits, endless nesting, a name given twice with different values, half
    surrogate pairs. `nan` allows NaN and infinities.
    """
    decoder = _LENIENT if nan else _STRICT
    try:
        value = decoder.decode(text)
        if "\\u" in text or not text.isascii():
            _encodable(value)
        return value
    except json.JSONDecodeError as error:
        place = f"{where}, line {first_line + error.lineno - 1}"
        raise kind(f"{place}: malformed JSON ({error.msg} at column {error.colno}).{expected}") from error
    except (RecursionError, ValueError) as error:
        line = first_line + text.count("\n", 0, _first_refused(text, decoder))
        raise kind(f"{where}, line {line}: {_why(error)}.") from error


def _encodable(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise _NotUsableError(f"a text holds half a surrogate pair ({half}), which is no character") from None


def _first_refused(text: str, decoder: json.JSONDecoder) -> int:
    """The position of the first refused item of a list: a list may span many lines. 0 for everything else."""
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        return 0
    while True:
        at = _after_space(text, at + 1)  # past the bracket, or a comma
        try:
            item, end = decoder.raw_decode(text, at)
            _encodable(item)
        except (RecursionError, ValueError):
            return at
        at = _after_space(text, end)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error) if isinstance(error, _NotUsableError) else "a whole number has too many digits"


def _no_constant(name: str) -> Any:
    raise _NotUsableError(f"{name} is no number that JSON knows; write null, or leave it out")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise _NotUsableError(f"{shown(name, 60)} is given twice, with different values")
    return found


_STRICT = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_once)
_LENIENT = json.JSONDecoder(object_pairs_hook=_once)


# --- YAML ------------------------------------------------------------------------------------------------------------


def parse_yaml(text: str, where: str, kind: Refusal) -> tuple[Any, Mapping[Any, int]]:
    """The value of a YAML text, and the line of each name at its top level.

    Raises `kind` with the line for malformed YAML, aliases that expand to more than YAML_VALUES values or contain
    themselves, endless nesting, a name given twice with different values, and values such as month 13.
    """
    import yaml

    try:
        return _loaded(yaml.SafeLoader(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = "" if mark is None else f", line {mark.line + 1}"
        raise kind(f"{where}{at}: not valid YAML ({reason(ValueError(error.problem or error.context))}).") from error
    except yaml.YAMLError as error:
        at = f", line {text.count(chr(10), 0, error.position) + 1}" if hasattr(error, "position") else ""
        raise kind(f"{where}{at}: not valid YAML ({reason(error)}).") from error


def _loaded(loader: Any) -> tuple[Any, Mapping[Any, int]]:
    import yaml

    try:
        node: Any = loader.get_single_node()
        if node is None:
            return None, {}
        _size(node, loader, {})
        value = loader.construct_document(node)
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        return value, {str(key.value): key.start_mark.line + 1 for key, _ in pairs}
    except RecursionError:
        raise yaml.composer.ComposerError(None, None, "nested too deeply", loader.get_mark()) from None
    finally:
        loader.dispose()


def _size(node: Any, loader: Any, sizes: dict[int, int]) -> int:
    """The number of values in a node with its aliases expanded. Nodes are remembered; 0 marks one in work.

    Raises what the loader raises, and the same error for a value on which the loader fails.
    """
    import yaml

    def refuse(why: str) -> Any:
        raise yaml.composer.ComposerError(None, None, why, node.start_mark)

    if isinstance(node, yaml.ScalarNode):
        try:
            node.value.encode()
            loader.construct_object(node)
        except UnicodeEncodeError:
            refuse("a text holds half a surrogate pair, which is no character")
        except (ValueError, OverflowError) as error:
            refuse("too many digits" if "digits" in str(error) else reason(error))
        return 1
    if id(node) in sizes:
        return sizes[id(node)] or refuse("it holds itself")
    sizes[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    for part in parts:
        total += _size(part, loader, sizes)
    if total > YAML_VALUES:
        refuse(f"it stands for more than {YAML_VALUES} values")
    sizes[id(node)] = total
    return total


def _refuse_twice(node: Any) -> None:
    import yaml

    seen: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        first = seen.setdefault(key.value, value)
        if first is not value and yaml.serialize(first) != yaml.serialize(value):
            problem = f"{shown(key.value, 60)} is given twice, with different values"
            raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
