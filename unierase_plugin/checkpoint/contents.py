"""Tells the files of an output folder that this package wrote (the folder lists them) from all other files.

When a folder is replaced, only files may be deleted that a run wrote and nobody changed since.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..models.adapters import is_exported_edit
from .record import RECORD

#: The list of the written files, in every folder that this package writes: size, time and digest by name.
LIST = ".unierase-files.json"
#: The most files that a message names.
NAMED = 3
#: Bytes that are hashed at a time.
CHUNK = 1 << 20

#: What may be in folders from versions that wrote no list: files of a model, of its tokenizer, and of the record.
_MODEL = (
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
_RECORD = rf"{RECORD}/(manifest|report|report-\d+|digests)\.json|{RECORD}/edits\.safetensors|{RECORD}/ledger\.jsonl"
#: What may be in such a folder, by the file that tells the kind of the folder.
_UNLISTED = {
    f"{RECORD}/manifest.json": f"{_MODEL}|{_RECORD}",
    "finetune.json": rf"{_MODEL}|finetune\.json",
    "adapter_config.json": rf"{_MODEL}|adapter_config\.json|adapter_model\.safetensors|README\.md",
}
#: The weights of the model itself. The weights of the new version replace them.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


def write_list(folder: Path, foreign: Collection[str] = ()) -> None:
    """Writes the list of a new folder's files, without those that are `foreign`."""
    names = [name for name in _names(folder) if name not in foreign and name != LIST]
    files = {name: _described(folder / name) for name in names}
    text = json.dumps({"written_by": "unierase-plugin", "files": files}, indent=1, ensure_ascii=False)
    (folder / LIST).write_text(text + "\n", encoding="utf-8")


def refuse_foreign(folder: Path) -> None:
    """Raises CheckpointError if a folder holds files that this package did not write, or that were changed since."""
    unknown, changed = foreign_files(folder)
    if not _is_ours(folder):
        raise CheckpointError(
            f"{str(folder)!r} is not replaced: nothing in it says that this package wrote it. It holds "
            f"{_few(unknown)}. Choose another output folder, or move these files away first."
        )
    for names, what in (
        (unknown, "which this package did not write there"),
        (changed, "changed since this package wrote it"),
    ):
        if names:
            raise CheckpointError(
                f"{str(folder)!r} is not replaced: it holds {_few(names)}, {what}. Move what you want to keep "
                "elsewhere, delete the rest, or choose another output folder."
            )


def foreign_files(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files that this package did not write, and of those that were changed since. Relative to the folder.

    Folders from earlier versions have no list. There, a file counts as written if they wrote files of this name.
    """
    listed = _read_list(folder)
    names = [name for name in _names(folder) if name != LIST or listed is None]
    if listed is None:
        pattern = _unlisted_names(folder)
        return [name for name in names if not re.fullmatch(pattern, name)], []
    changed = [name for name in names if name in listed and not _is_as_listed(folder / name, listed[name])]
    return [name for name in names if name not in listed], changed


def changed_contents(folder: Path) -> list[str] | None:
    """Names of the files that this package wrote and whose content has changed or that are gone. Times do not count.

    Weights and record are left out, since they have their own digests. None for a folder without a list.
    """
    listed = _read_list(folder)
    if listed is None:
        return None
    names = [name for name in sorted(listed) if not _WEIGHTS.fullmatch(name) and not re.fullmatch(_RECORD, name)]
    return [name for name in names if not _is_as_listed(folder / name, listed[name], by_time=False)]


def is_whole(folder: Path) -> bool:
    """Whether a folder that this package wrote still holds every file of its list as it was written."""
    listed = _read_list(folder)
    return listed is not None and all(_is_as_listed(folder / name, entry) for name, entry in listed.items())


def carry_over(folder: Path, staging: Path) -> list[str]:
    """Carries foreign files from `folder` to `staging`, its new version. Returns the names that are foreign there too.

    Files are linked if the file system can do it. A file of the new version is never replaced by one of the same name.
    """
    unknown, changed = foreign_files(folder)
    kept = []
    for name in (*unknown, *changed):
        source, target = folder / name, staging / name
        if os.path.lexists(target):
            if name in unknown and target.is_file() and source.is_file() and filecmp.cmp(source, target, shallow=False):
                kept.append(name)
        elif not _WEIGHTS.fullmatch(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(source, target)
            kept.append(name)
    return kept


def _is_ours(folder: Path) -> bool:
    return _read_list(folder) is not None or bool(_unlisted_names(folder))


def _unlisted_names(folder: Path) -> str:
    """A pattern of the names that a version without a list wrote into such a folder; "" for any other folder."""
    for mark, pattern in _UNLISTED.items():
        if (folder / mark).is_file() and _is_mark(folder, mark):
            return pattern
    return ""


def _is_mark(folder: Path, mark: str) -> bool:
    found = _read_json(folder / mark)
    if mark == "adapter_config.json":
        return is_exported_edit(folder)  # other tools write such a file too
    wanted = {"schema", "method"} if mark.startswith(RECORD) else {"hparams", "fingerprint_before"}
    return isinstance(found, dict) and wanted <= found.keys()


def _read_list(folder: Path) -> dict[str, Any] | None:
    found = _read_json(folder / LIST)
    if not isinstance(found, dict) or found.get("written_by") != "unierase-plugin":
        return None
    files = found.get("files")
    return files if isinstance(files, dict) else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _names(folder: Path) -> Iterator[str]:
    """The name of every file below the folder, with slashes. A link counts as a file, whatever it points to."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in sorted((*files, *links)):
            yield (Path(place) / name).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _described(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": _sha256(path)}


def _is_as_listed(path: Path, entry: Any, by_time: bool = True) -> bool:
    """Compares size and time, and the content if the time differs: copying a folder changes its times."""
    if path.is_symlink() or not path.is_file() or not isinstance(entry, dict):
        return False
    found = path.stat()
    if found.st_size != entry.get("size"):
        return False
    return (by_time and found.st_mtime_ns == entry.get("mtime_ns")) or _sha256(path) == entry.get("sha256")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            found.update(piece)
    return found.hexdigest()


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more
