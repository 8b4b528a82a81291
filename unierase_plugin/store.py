"""The cache on disk, fingerprints that key it, and writing that leaves either the old state or the new one.

Statistics, tokens and values are expensive and reusable: a `Store` keeps each in one safetensors file, under a key that
is a digest of everything it depends on. Files are written beside their final name, synced and renamed; whole folders
likewise (`replace_folder`). A process that is killed leaves at most a hidden `.<name>.writing-<pid>`, which the next
one clears away.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .digests import Seal, content_digests
from .errors import CheckpointError, WriteError, did_you_mean, shown
from .inputs import checked_path
from .locate_then_edit.statistics import MomentSums, SecondMoment
from .locate_then_edit.values import Values
from .unlearning_token import UnlearningToken

logger = logging.getLogger(__name__)

#: Named tensors and the text that goes with them: what one file holds.
Packed = tuple[dict[str, Tensor], dict[str, str]]

#: Part of every cache key: raised when what a phase computes changes.
CACHE_VERSION = "3"
#: Parts of a damaged file that an error names at most.
NAMED = 3
#: Marks a warning as one of several that a command line tells in one line (`cli.console.our_log`).
ONE_OF_NOT_KEPT = {"one_of": "results were not kept for later runs"}
ONE_OF_DAMAGED = {"one_of": "damaged files of the cache were computed again"}
#: Name in a file's metadata of the digests of all else in it.
SEAL = "sha256"

_Record = TypeVar("_Record")


def cache_folder(explicit: str = "") -> Path:
    """Where reusable results live: `explicit`, else UNIERASE_CACHE, XDG_CACHE_HOME/unierase, or ~/.cache/unierase.

    Raises CheckpointError where no folder can be there: a file is in the way, or the home is not known.
    """
    chosen = explicit or os.environ.get("UNIERASE_CACHE", "")
    base = os.environ.get("XDG_CACHE_HOME", "")
    place = Path(chosen) if chosen else (Path(base) if base else _home() / ".cache") / "unierase"
    found = checked_path(place, CheckpointError, "cache folder")
    there = next((each for each in (found, *found.parents) if each.exists()), found)
    if there.exists() and not there.is_dir():
        raise CheckpointError(
            f"The cache folder {shown(str(found))} cannot be made: {shown(str(there))} is a file. "
            "Set UNIERASE_CACHE (or the setting stats_dir) to a folder."
        )
    return found


def _home() -> Path:
    with suppress(RuntimeError):
        home = Path.home()
        # An empty HOME would be read as the root of the file system.
        if os.environ.get("HOME") != "" and home.is_absolute():
            return home
    raise CheckpointError(
        "There is no place for the cache: the home folder is not known (HOME is not set). Set UNIERASE_CACHE, or HOME, "
        "to a folder."
    )


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def digest(*parts: str | bytes | float | Mapping[Any, Any] | Sequence[Any]) -> str:
    """Hex sha256 of the parts as canonical JSON: the order of a mapping's keys does not matter, a sequence's does.

    Raises TypeError for a value whose text could differ from run to run.
    """
    text = json.dumps(plain(parts, strict=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def model_fingerprint(model: nn.Module, names: Iterable[str] | None = None) -> str:
    """Hex sha256 over name, dtype, shape and sha256 of the parameters (all, or those named), and the model's type.

    The same on every device and however the modules are ordered; a tied parameter counts once, under the first of its
    names in the alphabet. Raises CheckpointError for an unknown name and for weights that are offloaded.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = sorted(parameters) if names is None else sorted(set(names))
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    total = hashlib.sha256(str(kind).encode())
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, ...]] = set()
    for name in chosen:
        if name not in parameters:
            raise CheckpointError(f"{type(model).__name__} has no parameter {name!r}.{did_you_mean(name, parameters)}")
        tensor = parameters[name].detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"The weight {name!r} is not in memory (offloaded to disk or CPU). Load the model without offloading, "
                "on a device that holds all of it."
            )
        # Two parameters in one place are one, as they are in a file.
        place = (tensor.data_ptr(), *tensor.shape)
        if tensor.data_ptr() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor
    for (name, tensor), part in zip(tensors.items(), content_digests(tensors.values()), strict=True):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + part)
    return total.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of what a tokenizer does to text: vocabulary, merges, normalisation, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        # Both are left behind by the latest call rather than being part of the tokenizer.
        rules.pop("truncation", None)
        rules.pop("padding", None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return digest(rules, special, {"chat_template": getattr(tokenizer, "chat_template", None)})


def plain(value: Any, *, strict: bool = False) -> Any:
    """The value as JSON can hold it: dataclasses and mappings as objects, tensors as lists, NaN and infinity as null.

    Anything else becomes its text, or a TypeError where `strict`.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spec.name: plain(getattr(value, spec.name), strict=strict) for spec in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, strict=strict) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, strict=strict) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, strict=strict) for item in value), key=repr)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), strict=strict)
    if strict and not isinstance(value, (Path, torch.dtype, torch.device)):
        raise TypeError(
            f"{type(value).__name__} {value!r} has no stable text. Give str, bytes, numbers, lists or mappings."
        )
    return str(value)


# --- Files -----------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path, needed: int = 0) -> Iterator[Path]:
    """Gives a name beside `path` to write to; what is there takes the place of `path` at the end of the `with` block.

    The file is synced before, so that under its name it is whole or not there. What a writer of this file that was
    killed left beside it goes. `needed`: its size in bytes, for the message. Raises WriteError, with the old file as it
    was, where the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.writing-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync_folder(path.parent)
        clear_strays(path.parent, path.name, busy=True)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _cannot_write(path, needed, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Seal:
    """Writes a safetensors file, whole or not at all (`whole_file`), with digests of what is in it, and returns these.

    Raises WriteError, with the old file as it was, where the disk is full or the folder cannot be written.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    seal = Seal.of(tensors, metadata)
    with whole_file(path, size) as partial:
        save_file(_writable(tensors), str(partial), {**metadata, SEAL: seal.dumps()})
    return seal


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all (`whole_file`)."""
    with whole_file(path, len(data)) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all (`whole_file`)."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON (`plain`), whole or not at all (`whole_file`). What is no finite number becomes null."""
    write_text(path, json.dumps(plain(value), ensure_ascii=False, indent=1) + "\n")


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and no two of them in one storage, which safetensors refuses."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        local = tensor.detach().cpu().contiguous()
        place = local.untyped_storage().data_ptr()
        ready[name] = local.clone() if place in storages else local
        storages.add(place)
    return ready


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds, and what of it is not what was written."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    #: Digests of the contents as they are.
    seal: Seal
    #: Whether the file says what its digests were; those of earlier versions do not.
    sealed: bool
    #: ("tensor", "text" or "seal", name) of what differs from that.
    differences: Sequence[tuple[str, str]]


def open_tensors(path: Path) -> TensorFile:
    """A file with whatever of it can be read. Raises CheckpointError where it is missing, cut short or no such file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {str(path)!r}.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged or cut short ({error}).") from error
    stated = metadata.pop(SEAL, None)
    seal = Seal.of(tensors, metadata)
    return TensorFile(tensors, metadata, seal, stated is not None, [] if stated is None else seal.differences(stated))


def read_tensors(path: Path) -> Packed:
    """The tensors and metadata of a file.

    Raises CheckpointError where it is missing, cut short, or holds something else than was written to it.
    """
    found = open_tensors(path)
    if found.differences:
        names = ", ".join(name or kind for kind, name in found.differences[:NAMED])
        raise CheckpointError(f"{str(path)!r} is damaged: {names} is not what was written.")
    return found.tensors, found.metadata


def refuse_other(path: Path, record: str, what: str) -> None:
    """Raises CheckpointError where there is something else at `path` than a file of such a record, before it goes."""
    if not os.path.lexists(path):
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            found = (file.metadata() or {}).get("record")
    except (SafetensorError, OSError, ValueError, RuntimeError):
        found = None
    if found != record:
        raise CheckpointError(f"{str(path)!r} is there, holds no {what}, and is not replaced. Name another file.")


class Store:
    """A folder of results by kind and key: `<root>/<kind>/<key>.safetensors`.

    It speeds a run up and must never end one: what cannot be read counts as absent and what cannot be written is left
    out, each with a warning in the log.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, kind: str, key: str) -> Path:
        for part in (kind, key):
            if not re.fullmatch(r"\w[\w.+-]*", part):
                raise CheckpointError(
                    f"{part!r} cannot be part of a file name. Use a digest, or letters, digits and '._+-'."
                )
        return self.root / kind / f"{key}.safetensors"

    def get(self, kind: str, key: str) -> Packed | None:
        path = self.path(kind, key)
        if not path.is_file():
            return None
        try:
            return read_tensors(path)
        except CheckpointError as error:
            logger.warning("Computing again: %s", error, extra=ONE_OF_DAMAGED)
            return None

    def cached(self, kind: str, key: str, compute: Callable[[], Packed]) -> Packed:
        """What is kept under this key; else what `compute` gives, which is then kept."""
        found = self.get(kind, key)
        if found is None:
            found = compute()
            self.put(kind, key, *found)
        return found

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        path = self.path(kind, key)
        try:
            write_tensors(path, tensors, metadata)
        except CheckpointError as error:
            logger.warning("Not kept for later runs: %s", error, extra=ONE_OF_NOT_KEPT)
            return
        clear_strays(path.parent, busy=True)


# --- Dataclasses as files --------------------------------------------------------------------------------------------


def pack_token(token: UnlearningToken) -> Packed:
    return _pack(token)


def unpack_token(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> UnlearningToken:
    return _unpack(UnlearningToken, tensors, metadata)


def pack_moment(moment: SecondMoment) -> Packed:
    return _pack(moment)


def unpack_moment(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> SecondMoment:
    return _unpack(SecondMoment, tensors, metadata)


def pack_sums(sums: MomentSums) -> Packed:
    return _pack(sums)


def unpack_sums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> MomentSums:
    return _unpack(MomentSums, tensors, metadata)


def pack_values(values: Values) -> Packed:
    return _pack(values)


def unpack_values(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Values:
    return _unpack(Values, tensors, metadata)


def _pack(record: Any) -> Packed:
    """Fields that are tensors, or tensors by layer, go to tensors (`moments.3`); all others to one JSON text."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for spec in dataclasses.fields(record):
        value = getattr(record, spec.name)
        if isinstance(value, Tensor):
            tensors[spec.name] = value
        elif isinstance(value, Mapping):
            tensors.update({f"{spec.name}.{layer}": tensor for layer, tensor in value.items()})
        else:
            others[spec.name] = value
    return tensors, {"record": type(record).__name__, "fields": json.dumps(others)}


def _unpack(kind: type[_Record], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> _Record:
    """Raises CheckpointError where the file holds another kind of record, or one of another version of this package."""
    fields: dict[str, Any] = {}
    try:
        if metadata["record"] != kind.__name__:
            raise TypeError(f"it holds {metadata['record']}")
        for name, value in json.loads(metadata["fields"]).items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        fields.update({name: tensor for name, tensor in tensors.items() if "." not in name})
        # The file is in no useful order, and layers are gone through from the bottom.
        by_layer = sorted((int(name.rpartition(".")[2]), name) for name in tensors if "." in name)
        for layer, name in by_layer:
            fields.setdefault(name.rpartition(".")[0], {})[layer] = tensors[name]
        return kind(**fields)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The file does not hold {kind.__name__} as this version writes it ({error}). Delete it."
        ) from error


# --- Folders ---------------------------------------------------------------------------------------------------------


@contextmanager
def replace_folder(folder: Path, needed: int, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of `folder` at the end of the `with` block.

    Whatever goes wrong inside, the folder to fill is removed and `folder` is as it was. `needed` is the size in bytes
    of what is to be written. `check` is called before the two are exchanged, and raises where that is not to be. An
    OSError becomes a CheckpointError that says how much room there is.
    """
    folder = Path(folder).expanduser().resolve()
    staging = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    try:
        clear_leftovers(folder)
        staging.mkdir(parents=True)
        if shutil.disk_usage(staging).free < needed:
            raise OSError("the disk has too little room")
        yield staging
        sync_tree(staging)
        check()
        _swap_in(staging, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _cannot_write(folder, needed, error) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _swap_in(staging: Path, folder: Path) -> None:
    """Two renames; the first is taken back where the second fails. A kill between them is mended by the next run."""
    aside = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    try:
        if folder.exists():
            os.rename(folder, aside)
        os.rename(staging, folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Removes what processes that are gone left beside `folder`, or puts it back where it is the only whole version.

    A leftover with this process' own number is an earlier life's: in a container every run may have the same number.
    """
    folder = Path(folder).expanduser().resolve()
    for purpose in ("replaced", "writing"):
        for leftover, pid in _leftovers(folder.parent, folder.name, purpose):
            if not _is_gone(pid):
                continue
            if purpose == "replaced" and not folder.exists():
                os.rename(leftover, folder)
            else:
                _discard(leftover)


def remove_folder(folder: Path) -> None:
    """Removes a folder, where there is one. A kill leaves it whole, or under a name that `clear_strays` knows."""
    aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
    _discard(aside)
    with suppress(OSError):
        os.rename(folder, aside)
        _discard(aside)


def _discard(path: Path) -> None:
    """Removes a file or folder as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def clear_strays(folder: Path, name: str = "", *, busy: bool = False) -> None:
    """Removes what processes that are gone left half written in `folder`: of the entry `name`, of any where empty.

    busy: whether this process may be writing there, in another thread. Else its own number is an earlier life's, as in
    `clear_leftovers`.
    """
    for stray, pid in _leftovers(folder, name, "writing"):
        if _is_gone(pid, busy):
            _discard(stray)


def make_folder(folder: Path) -> Path:
    """The folder as an absolute path, made where there is none. Raises CheckpointError where it is a file, and
    WriteError where it cannot be made."""
    target = folder.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(
            f"{str(target)!r} is a file. Give the name of a folder, which is made where there is none."
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(target, 0, error) from error
    return target


def _leftovers(parent: Path, name: str, purpose: str) -> list[tuple[Path, int]]:
    """Hidden entries `.<name>.<purpose>-<pid>` with their process; any name where `name` is empty."""
    pattern = re.compile(rf"\.{re.escape(name) if name else '.+'}\.{purpose}-(\d+)(?:-\d+)?")
    with suppress(OSError):
        matches = [(entry, pattern.fullmatch(entry.name)) for entry in parent.iterdir()]
        return [(entry, int(match[1])) for entry, match in matches if match]
    return []


def _is_gone(pid: int, busy: bool = False) -> bool:
    """Whether a leftover's process has ended; with this one's number it has too, unless this one is `busy` there."""
    return not _is_running(pid) or (pid == os.getpid() and not busy)


def _is_running(pid: int) -> bool:
    # On Windows, os.kill with signal 0 is no question: it would end the process.
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Has the system write down a folder with all its files, before it takes its name."""
    entries = sorted(folder.rglob("*"))
    for file in (entry for entry in entries if entry.is_file()):
        _sync(file)
    for subfolder in (entry for entry in (*entries, folder) if entry.is_dir()):
        _sync_folder(subfolder)


def _sync_folder(path: Path) -> None:
    # Several network file systems, and Windows, cannot sync a folder; the rename itself is atomic there all the same.
    with suppress(OSError):
        _sync(path)


def _cannot_write(path: Path, needed: int, error: Exception) -> WriteError:
    """Measured after the partial output is gone, so that the number is what a second try would find."""
    place, free = _free(path)
    return WriteError(
        f"{str(path)!r} could not be written ({error}); what was there before is as it was. It needs about "
        f"{_size(needed)}, and {_size(free)} are free in {str(place)!r}. Free some room, or choose another place."
    )


def check_room(path: Path, needed: int) -> None:
    """Raises WriteError where the disk that `path` is to lie on has fewer than `needed` bytes free.

    What `path` holds now does not count: the old state stays until the new one is whole.
    """
    place, free = _free(path.expanduser().absolute())
    if free < needed:
        raise WriteError(
            f"{str(path)!r} needs about {_size(needed)}, and {_size(free)} are free in {str(place)!r}. Free some room, "
            "or choose another place. Nothing was done yet."
        )


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk, or one's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def _free(path: Path) -> tuple[Path, int]:
    """The folder nearest above `path` that exists, and the bytes free there."""
    place = next((parent for parent in path.parents if parent.exists()), Path.cwd())
    return place, shutil.disk_usage(place).free


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
