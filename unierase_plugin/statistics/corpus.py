"""Text for the second moment C, always as token ids: from the hub, from a file, or sampled from the model itself."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import DependencyError, EditError, listed, reason, shown
from ..models.generate import generate, pad_token_id
from ..models.prompts import begun, encode, has_chat_template, render
from ..models.trace import pad
from ..storage.inputs import checked_path, decoded

#: Texts sampled together: enough to keep the machine busy, few enough for the cache of a small one.
SAMPLE_ROWS = 64
#: Texts tokenised together.
TEXT_GROUP = 256
#: Columns in which a dataset's text is looked for if none is named.
TEXT_COLUMNS = ("text", "content")


def corpus_tokens(
    spec: str,
    model: Any,
    tokenizer: Any,
    *,
    samples: int,
    max_length: int,
    seed: int,
    openings: Sequence[str] = (),
    progress: Callable[[float], None] = lambda share: None,
) -> list[Sequence[int]]:
    """`samples` sequences of at most `max_length` tokens, each the beginning of a text; fewer if texts run out.

    spec: "self", a text file's path, or a hub dataset as "name", "name:config" or "name:config:column". Only the needed
    part of a file or dataset is read. `openings` are questions with which sampled texts begin. Raises EditError or
    DependencyError, which say what to give instead.
    """
    if spec == "self":
        return list(sample_from_model(model, tokenizer, samples, max_length, seed, openings, progress))
    texts = _file_texts(Path(spec)) if Path(spec).is_file() else _hub_texts(spec)
    found: list[Sequence[int]] = []
    # In groups: a tokenizer uses every core on a list of texts.
    while group := list(itertools.islice(texts, min(TEXT_GROUP, samples - len(found)))):
        ids = tokenizer(group, truncation=True, max_length=max_length)["input_ids"]
        # As arrays: a hundred thousand lists of Python integers take ten times the memory.
        found += [array("i", sequence) for sequence in ids if len(sequence) > 1]
        progress(len(found) / samples)
    if not found:
        raise EditError(f"The corpus {shown(spec)} holds no text.")
    return found


def check_corpus_file(spec: str, samples: int) -> None:
    """Raises EditError if the corpus is a file without text in the part to be read. Call it before loading.

    It does not ask whether a dataset of that name is on the hub.
    """
    path = checked_path(spec, EditError, "corpus")
    if spec != "self" and path.is_file() and not any(1 for _ in itertools.islice(_file_texts(path), samples)):
        raise EditError(f"The corpus {shown(spec)} holds no text.")


def corpus_identity(spec: str) -> list[str]:
    """The sha256 of a local file, which tells one content from another under the same name. Empty for other corpora."""
    path = Path(spec)
    if not path.is_file():
        return []
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return [total.hexdigest()]


def _file_texts(path: Path) -> Iterator[str]:
    """Paragraphs of a text file, separated by blank lines."""
    try:
        with path.open(encoding="utf-8") as file:
            for blank, part in itertools.groupby(file, key=lambda line: not line.strip()):
                if not blank:
                    yield "".join(part).rstrip("\n")
    except UnicodeDecodeError as error:
        with path.open("rb") as raw:
            for number, line in enumerate(raw, start=1):
                decoded(path, line, EditError, number)  # says which line it is
        raise EditError(f"The corpus {shown(str(path))} is not UTF-8 text: {reason(error)}.") from error
    except OSError as error:
        raise EditError(f"The corpus {shown(str(path))} cannot be read: {reason(error)}.") from error


def _hub_texts(spec: str) -> Iterator[str]:
    """Streams a hub dataset, so that nothing is stored on disk."""
    name, config, column = (*spec.split(":"), "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError("A corpus from the hub needs the package `datasets`: pip install datasets.") from error
    count = 0
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            count += 1
            column = column or next((key for key in TEXT_COLUMNS if isinstance(row.get(key), str)), "")
            if column not in row:
                raise EditError(
                    f"The corpus {shown(spec)} has no column {shown(column or 'text')}. Name one of "
                    f"{listed(map(repr, row))}, "
                    f"as in {name}:{config}:COLUMN."
                )
            if row[column]:
                yield str(row[column])
    except EditError:
        raise
    except Exception as error:
        what = f"broke off after {count} texts" if count else "is no file and cannot be read from the hub"
        raise EditError(
            f"The corpus {shown(spec)} {what} ({type(error).__name__}: {reason(error)}). "
            "Give a text file, or --corpus self to sample text from the model."
        ) from error


@torch.no_grad()
def sample_from_model(
    model: Any,
    tokenizer: Any,
    samples: int,
    max_length: int,
    seed: int,
    openings: Sequence[str],
    progress: Callable[[float], None] = lambda share: None,
) -> list[list[int]]:
    """Text that the model writes at temperature 1: answers to `openings` in chat form, and free text, in turn."""
    starts = list(itertools.islice(itertools.cycle(_starts(tokenizer, openings)), samples))
    pad_id = pad_token_id(model, tokenizer)
    device = model.get_input_embeddings().weight.device
    out: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, samples, SAMPLE_ROWS):
            batch = pad(starts[first : first + SAMPLE_ROWS], pad_id, "left", device)
            room = max(8, max_length - batch.ids.shape[1])
            written = generate(model, batch.ids, batch.mask, room, pad_id, temperature=1.0)
            ids = torch.cat([batch.ids, written], 1)
            out += [
                _trim(row, mask, batch.ids.shape[1], pad_id)
                for row, mask in zip(ids.tolist(), batch.mask.tolist(), strict=True)
            ]
            progress(len(out) / samples)
    return out


def _starts(tokenizer: Any, openings: Sequence[str]) -> list[list[int]]:
    """Prompts to sample from: each opening in chat form, then its first words as free text."""
    starts = []
    for opening in openings or ("The",):
        if has_chat_template(tokenizer):
            starts.append(encode(tokenizer, render(tokenizer, opening, "chat", thinks=True), "chat"))
        starts.append(begun(tokenizer, " ".join(opening.split()[:2])))
    return starts


def _trim(ids: list[int], prompt_mask: list[int], width: int, pad_id: int) -> list[int]:
    """Without the padding on the left, and without everything after the end token."""
    body = ids[width:]
    end = next((index for index, token in enumerate(body) if token == pad_id), len(body))
    return [token for token, real in zip(ids[:width], prompt_mask, strict=True) if real] + body[:end]
