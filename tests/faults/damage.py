"""Damaged files: what reads them refuses, or gives what it gives for the whole file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scenarios import ONE, TWO
from trials import Trial, Trials
from worlds import Ended, State, Try, copied, differing, state

Damage = Callable[[bytes], bytes]

#: What reads an output folder, with what it writes; `inspect` writes on its standard output.
READERS: dict[str, tuple[tuple[str, ...], str]] = {
    "revert": (("revert", "two", "--out", "back"), "back"),
    "revert --step": (("revert", "two", "--out", "back-1", "--step", "1"), "back-1"),
    "revert --request": (("revert", "two", "--out", "back-r", "--request", "more-0"), "back-r"),
    "export": (("export", "two", "--adapter", "adapter"), "adapter"),
    "inspect": (("inspect", "two", "--json"), ""),
    "next step": (
        tuple({"one": "two", "two": "three", "more.jsonl": "others.jsonl"}.get(word, word) for word in TWO),
        "three",
    ),
}


@dataclass(frozen=True)
class Read:
    """What a reader gives."""

    status: int | None
    found: State
    #: What a reader that writes nothing shows.
    shown: str
    crashed: bool
    #: Whether it says that something is damaged.
    warned: bool


def damages(data: bytes, name: str, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` bit flips spread over the file, cuts, and for a list of lines a lost and an exchanged one."""
    draw = random.Random(f"{name} {count}")
    for at in range(count):
        place = min(len(data) - 1, at * len(data) // count + draw.randrange(max(1, len(data) // count)))
        bit = 1 << draw.randrange(8)
        flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        yield f"bit {bit} of byte {place}", flipped
    for kept in sorted({0, len(data) // 2, len(data) - 1}):
        yield f"cut to {kept} of {len(data)} bytes", data[:kept]
    if name.endswith(".jsonl"):
        lines = data.decode().splitlines(keepends=True)
        yield "without its first line", "".join(lines[1:]).encode()
        records = [json.loads(line) for line in lines]
        records[0]["columns"], records[1]["columns"] = records[1].get("columns"), records[0].get("columns")
        yield "with exchanged columns", "".join(json.dumps(record) + "\n" for record in records).encode()


def read(trials: Trials, work: Path, reader: str) -> Read:
    words, out = READERS[reader]
    [ended] = trials.zygote.run(Try(work, words))
    return _as_read(ended, work / out if out else None)


def _as_read(ended: Ended, out: Path | None) -> Read:
    shown = ended.output if out is None else ""
    return Read(ended.status, state(out) if out else None, shown, ended.crashed, "damaged" in ended.output)


def record_trials(trials: Trials, count: int, readers: Sequence[str] = tuple(READERS)) -> Iterator[Trial]:
    """Every file of the record, and the weights, damaged in every way, read by every reader."""
    template = trials.world((ONE, TWO))
    with copied(template, trials.scratch / "work") as work:
        clean = {reader: read(trials, work, reader) for reader in readers}
        files = [*sorted((work / "two" / "unierase").iterdir()), work / "two" / "model.safetensors"]
        whole = {str(file.relative_to(work)): file.read_bytes() for file in files}
    for reader, found in clean.items():
        if found.status:
            raise RuntimeError(f"{reader} ended with {found.status} on a whole folder")
    for name, data in whole.items():
        for what, bytes_after in damages(data, name, count):
            if bytes_after == data:
                continue
            with copied(template, trials.scratch / "work") as work:
                (work / name).write_bytes(bytes_after)
                for at, reader in enumerate(readers):
                    found = read(trials, work, reader)
                    yield Trial(reader, "damaged file", at, f"{name}, {what}", tuple(_wrong(found, clean[reader])))


def cache_trials(trials: Trials, count: int) -> Iterator[Trial]:
    """Every file of the cache damaged, and the run that would take it."""
    template = trials.world((ONE,))
    wanted = state(template / "one")
    files = {
        str(file.relative_to(template)): file.read_bytes()
        for file in sorted((template / "cache").rglob("*.safetensors"))
    }
    words = tuple("again" if word == "one" else word for word in ONE)
    for name, data in files.items():
        for what, bytes_after in damages(data, name, count):
            with copied(template, trials.scratch / "work") as work:
                (work / name).write_bytes(bytes_after)
                [ended] = trials.zygote.run(Try(work, words))
                found = _as_read(ended, work / "again")
                problems = tuple(_wrong(found, Read(0, wanted, "", False, False)))
                kind = str(Path(name).parent.name)
                yield Trial("run", "damaged cache", 0, f"{kind}, {what}", problems)


def _wrong(found: Read, clean: Read) -> Iterator[str]:
    if found.crashed:
        yield "a traceback"
    elif found.status is None:
        yield "it did not end"
    elif found.status == 0:
        changed = differing(found.found, clean.found)
        weights = [name for name in changed if name.endswith(".safetensors") or name == "."]
        if weights:
            yield f"other weights: {', '.join(weights)}"
        elif (changed or found.shown != clean.shown) and not found.warned:
            yield f"another result in silence: {', '.join(changed[:4]) or 'what it says'}"
