"""Folders in which a command is tried, what they hold in a form that two runs share, and the process that runs it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from operations import ended_beside
from safetensors import SafetensorError, safe_open
from small import FORGET, FORGET_MORE, FORGET_OTHERS, RETAIN, SHORT, save_base

HERE = Path(__file__).parent
#: Seconds after which a command counts as stuck; a tiny one takes two or three on a core of its own.
LIMIT = 300
#: Keys that differ between two runs of the same: times, what a stopped run says of itself, digests of what holds those.
TIMES = {
    "created",
    "seconds",
    "phases",
    "reading",
    "counting",
    "peak_memory_bytes",
    "memory",
    "interrupted",
    "retry",
    "sha256",
    "files",
}
UNLIKE = re.compile(r"\.lock$|^log\.txt$|\.begun$")
DIGESTS = ("digests.json", ".unierase-files.json")
#: What a run that was stopped leaves, and the next one clears away.
LEFTOVER = re.compile(r"^\..+\.(writing|replaced)-\d+|\.work$|^\..+\.(writing|replaced)\b|\.writing-\d+$")

#: A file's or folder's content by relative path; None where there is none.
State = dict[str, Any] | None


@dataclass(frozen=True)
class Ended:
    """How a command ended; `status` is None where it was still running at the limit."""

    status: int | None
    output: str
    operations: tuple[dict[str, Any], ...]

    @property
    def crashed(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    def last(self) -> str:
        """The end of what it said, on one line."""
        return " ".join(self.output.split())[-300:]


@dataclass(frozen=True)
class Try:
    """One command in a folder, and what is to go wrong with it."""

    folder: Path
    arguments: Sequence[str]
    fault: str = ""
    at: int = 0


class Zygote:
    """See zygote.py. One at a time, to be closed."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.known = scratch, False
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONDONTWRITEBYTECODE": "1",
            "UNIERASE_CACHE": str(scratch / "no-cache"),
            "COLUMNS": "200",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        if self._answer() != "ready":
            raise RuntimeError("The process that runs the commands did not start.")

    def run(self, *tries: Try, limit: float = LIMIT) -> list[Ended]:
        """All at once; each in its own folder's cache, `cache` beside what the command is given."""
        jobs: list[dict[str, Any]] = []
        for place, each in enumerate(tries):
            log, output = self.scratch / f"operations-{place}", self.scratch / f"output-{place}"
            log.unlink(missing_ok=True)
            ended_beside(log).unlink(missing_ok=True)
            jobs.append(
                {
                    "arguments": list(each.arguments),
                    "folder": str(each.folder),
                    "fault": each.fault,
                    "at": each.at,
                    "environment": {"UNIERASE_CACHE": str(each.folder / "cache")},
                    "log": str(log),
                    "output": str(output),
                }
            )
        found = self._ask({"jobs": jobs, "limit": limit})
        ended = []
        for status, job in zip(found, jobs, strict=True):
            lines = Path(job["log"]).read_text().splitlines() if os.path.exists(job["log"]) else []
            said = Path(job["output"]).read_text(errors="replace") if os.path.exists(job["output"]) else ""
            # A limit of sizes may cut the last one.
            ended.append(Ended(status, said, tuple(json.loads(line) for line in lines if line.endswith("}"))))
        return ended

    def warm(self, folder: Path, arguments: Sequence[str]) -> None:
        """Runs a command in the process itself, which has then imported and set up what such a command needs."""
        threads = self._ask({"warm": list(arguments), "folder": str(folder)})
        if threads != 1:
            raise RuntimeError(f"A process of {threads} threads is not to be forked.")

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(30)
        self.process.stdout.close()  # type: ignore[union-attr]

    def _ask(self, request: Mapping[str, Any]) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError("The process that runs the commands has ended.")
        return json.loads(line)


def make_ground(folder: Path) -> Path:
    """What every world begins with: a tiny base model, facts, short hyper-parameters, an empty cache."""
    save_base(folder / "base")
    sets = {"first": FORGET, "more": FORGET_MORE, "others": FORGET_OTHERS, "kept": RETAIN}
    for name, facts in {**sets, "wide": (*RETAIN, *FORGET_OTHERS)}.items():
        lines = [json.dumps({**fact, "case_id": f"{name}-{at}"}) + "\n" for at, fact in enumerate(facts)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    # As a tuple of tuples, YAML would need a tag.
    (folder / "short.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(SHORT))))
    (folder / "cache").mkdir()
    return folder


@contextmanager
def copied(template: Path, place: Path) -> Iterator[Path]:
    """A copy of a world for one try, always at the same path, since reports may name it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


# --- what a folder holds ---------------------------------------------------------------------------------------------


def state(path: Path) -> State:
    """Every file's content, without what two runs do not share; a file that cannot be read is `damaged`."""
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(entry for entry in path.rglob("*") if entry.is_file())
    return {str(file.relative_to(path)): content(file) for file in files if not UNLIKE.search(file.name)}


def content(file: Path) -> Any:
    """What a file says, in a form to compare: parsed where its name tells how."""
    try:
        if file.suffix == ".safetensors":
            return _tensors(file)
        if file.name in DIGESTS:
            # Of files that hold times, so that the values differ as those do; the package itself checks them.
            return sorted(_keys(json.loads(file.read_text(encoding="utf-8"))))
        if file.suffix == ".json":
            return _timeless(json.loads(file.read_text(encoding="utf-8")))
        if file.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        if file.suffix in (".html", ".md", ".tex"):
            text = file.read_text(encoding="utf-8")
            if file.suffix == ".html" and not text.rstrip().endswith("</html>"):
                return "damaged: not all of the page"
            # Times are among the figures.
            text = text.replace("<p>It was interrupted, so that its time is too short.</p>", "")
            return hashlib.sha256(re.sub(r"[\d.,:<]+(e-?\d+)?", "#", text).encode()).hexdigest()
    except (ValueError, OSError, SafetensorError) as error:
        return f"damaged: {error}"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _tensors(file: Path) -> dict[str, Any]:
    with safe_open(str(file), framework="np") as opened:
        described = opened.metadata() or {}
        names = sorted(opened.keys())
    # The bytes behind the header, whose text holds times.
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    tensors = {}
    for name in names:
        begin, end = header[name]["data_offsets"]
        shape = f"{header[name]['dtype']}{header[name]['shape']}"
        tensors[name] = shape + hashlib.sha256(data[begin:end]).hexdigest()
    return {"tensors": tensors, "metadata": _timeless({key: _parsed(value) for key, value in described.items()})}


def _keys(value: Any, under: str = "") -> Iterator[str]:
    for key, item in value.items() if isinstance(value, Mapping) else ():
        yield from (f"{under}/{key}", *_keys(item, f"{under}/{key}"))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    return value


def damaged(found: State) -> list[str]:
    """Files that are there under their final name and are not whole."""
    return [
        name
        for name, held in (found or {}).items()
        if isinstance(held, str) and held.startswith("damaged") and not is_leftover(name)
    ]


def is_leftover(name: str) -> bool:
    return any(LEFTOVER.search(part) for part in Path(name).parts)


def names(world: Path) -> set[str]:
    """Every path in a world, but for those that may differ."""
    return {str(entry.relative_to(world)) for entry in world.rglob("*") if not UNLIKE.search(entry.name)}


def differing(found: State, wanted: State) -> list[str]:
    """The files in which two states differ; `.` where one is not there at all."""
    if found is None or wanted is None:
        return [] if found is wanted else ["."]
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
