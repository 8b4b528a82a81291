"""Readers of the field's benchmarks: TOFU, RETURN, CounterFact and zsRE."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..errors import DependencyError, RequestError, UniEraseError, did_you_mean, first_words, reason, shown
from ..storage.inputs import checked_path
from .files import iter_records
from .records import Benchmark, Located, Reader, build_requests, field_of
from .request import ForgetRequest, has_word

logger = logging.getLogger(__name__)

TOFU_SPLITS = (
    *("forget01", "forget05", "forget10", "retain90", "retain95", "retain99", "full", "real_authors", "world_facts"),
    *("forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed"),
    *("real_authors_perturbed", "world_facts_perturbed"),
)
"""The configurations of `locuslab/TOFU` (Maini et al. 2024, arXiv 2401.06121)."""

RETURN_SPLITS = ("forget", "retain", "forget_train", "forget_eval", "retain_train", "retain_eval")
"""Sets of RETURN (Liu et al. 2024, arXiv 2407.10058); its authors halve each of the first two into train and eval."""


def read_tofu(split: str) -> tuple[ForgetRequest, ...]:
    """Reads a TOFU split from the folder in `UNIERASE_TOFU_DIR`, laid out as on the hub, or else from the hub.

    If the folder has `<split>_subject.json`, it gives the subjects, by question. For the forget sets,
    `forget10_subject.json` does too, since it covers them all.
    """
    records = tofu_records(split)
    folder = _folder("UNIERASE_TOFU_DIR")
    if folder is None:
        return build_requests(records, split)
    subjects = _tofu_subjects(folder, split)
    return build_requests(
        ((where, {"subject": subjects.get(str(field_of(where, each, "question"))), **each}) for where, each in records),
        split,
    )


def tofu_records(split: str, folder: str | os.PathLike[str] | None = None) -> Iterator[Located]:
    """The records of a TOFU split with all their fields, such as wrong and paraphrased answers.

    They come from `folder`, else from the folder in `UNIERASE_TOFU_DIR` (both laid out as on the hub), else from the
    hub.
    """
    _check_name("TOFU split", split, TOFU_SPLITS)
    found = _given_folder(folder, "UNIERASE_TOFU_DIR")
    if found is not None:
        return iter_records(found / f"{split}.json")
    remedy = f"Put its files ({split}.json as JSON lines) in a folder and set UNIERASE_TOFU_DIR to it"
    return _hub_records("locuslab/TOFU", split, "train", remedy)


def tofu_beside(split: str) -> tuple[ForgetRequest, ...]:
    """Reads the facts of a TOFU split with paraphrases and wrong answers, which TOFU keeps in files of their own.

    Returns nothing, with a warning, if these files cannot be read. The set `full` has no such file.
    """
    name = "retain_perturbed" if split.startswith("retain") else f"{split.removesuffix('_perturbed')}_perturbed"
    if name not in TOFU_SPLITS:
        return ()
    try:
        return build_requests(tofu_records(name), name)
    except UniEraseError as error:
        logger.warning("There are no paraphrases and no wrong answers for tofu:%s: %s", split, error)
        return ()


def _tofu_subjects(folder: Path, split: str) -> dict[str, str]:
    names = [f"{split}_subject.json", *(["forget10_subject.json"] if split.startswith("forget") else [])]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return {}
    return {field_of(*each, "question"): field_of(*each, "subject") for each in iter_records(path)}


def read_return(split: str) -> tuple[ForgetRequest, ...]:
    """Reads a set of RETURN from `UNIERASE_RETURN_DIR` (`<split>.jsonl` or `.json`), or else from the hub.

    A record is a question with its answer, or a person as the authors publish them: `name`, and under `data` a list
    with `question` and `gold_answer`. The person's name is the subject if the question has it.
    """
    return build_requests(return_records(split), split)


def return_records(
    split: str, folder: str | os.PathLike[str] | None = None, perturbed: bool = False
) -> Iterator[Located]:
    """The records of a set of RETURN, one for each question of a person, with all their fields.

    They come from `folder`, else from the folder in `UNIERASE_RETURN_DIR`, else from the hub. `perturbed` prefers the
    files with wrong answers that Yuan et al. 2024 (arXiv 2410.08109) publish: `<split>_perturbed.json`, and for the
    retain set `neighbor_perturbed.json`.
    """
    _check_name("RETURN set", split, RETURN_SPLITS)
    found = _given_folder(folder, "UNIERASE_RETURN_DIR")
    if found is not None:
        more = [f"{split}_perturbed.json", *(["neighbor_perturbed.json"] if split == "retain" else [])]
        names = [*(more if perturbed else []), f"{split}.json"]
        path = next((found / name for name in names if (found / name).exists()), found / f"{split}.jsonl")
        return _return_records(iter_records(path))
    remedy = (
        "Which facts are in it depends on the model that is to forget; put the set for yours in a folder as "
        f"{split}.jsonl and set UNIERASE_RETURN_DIR to it"
    )
    return _return_records(_hub_records("zhliu/RETURN", None, split, remedy))


def _return_records(records: Iterable[Located]) -> Iterator[Located]:
    for where, record in records:
        if not isinstance(record, Mapping) or not isinstance(record.get("data"), list):
            yield where, record
            continue
        name = record.get("name")
        for index, pair in enumerate(record["data"]):
            place = f"{where}, data[{index}]"
            question = field_of(place, pair, "question")
            # A short name may also stand inside a longer word. That word is not about the person.
            named = isinstance(name, str) and isinstance(question, str) and has_word(question, name)
            yield (
                place,
                {
                    "question": question,
                    "answer": field_of(place, pair, "gold_answer"),
                    "subject": name if named else None,
                },
            )


def read_counterfact(source: str) -> tuple[ForgetRequest, ...]:
    """Reads CounterFact (Meng et al. 2022, arXiv 2202.05262) from a file, or from the hub when `source` is `hub`.

    The question is the rewrite's prompt with the subject filled in. The answer to forget is the true target.
    """
    if source == "hub":
        remedy = "Download counterfact.json and give its path: counterfact:counterfact.json"
        records = _hub_records("azhx/counterfact", None, "train+test", remedy)
        return build_requests(map(_counterfact_record, records), "counterfact")
    return build_requests(map(_counterfact_record, iter_records(source)), Path(source).stem)


def _counterfact_record(located: Located) -> Located:
    where, record = located
    rewrite = field_of(where, record, "requested_rewrite")
    prompt, subject = field_of(where, rewrite, "prompt"), field_of(where, rewrite, "subject")
    if not isinstance(prompt, str) or not isinstance(subject, str) or "{}" not in prompt:
        raise RequestError(
            f"{where}: expected a 'prompt' with {{}} and a 'subject', got "
            f"{first_words(prompt)} and {first_words(subject)}."
        )
    answer = field_of(where, field_of(where, rewrite, "target_true"), "str")
    # Not str.format: a prompt may have braces of its own.
    question = prompt.replace("{}", subject, 1)
    return where, {"question": question, "answer": answer, "subject": subject, "case_id": record.get("case_id")}


def read_zsre(source: str) -> tuple[ForgetRequest, ...]:
    """Reads zsRE from a file in the layout of MEND and EasyEdit: `src`, `subject`, and `answers` or else `alt`.

    The first of `answers` is the true answer, the one to forget. `alt` is an editing target.
    """
    return build_requests(map(_zsre_record, iter_records(source)), Path(source).stem)


def _zsre_record(located: Located) -> Located:
    where, record = located
    question, subject = field_of(where, record, "src"), field_of(where, record, "subject")
    answers = record.get("answers")
    answer = answers[0] if isinstance(answers, list) and answers else answers or field_of(where, record, "alt")
    return where, {"question": question, "answer": answer, "subject": subject, "case_id": record.get("case_id")}


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise RequestError(f"Unknown {what} {shown(name)}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _given_folder(folder: str | os.PathLike[str] | None, variable: str) -> Path | None:
    """The given folder, else the folder that the environment variable names; None if neither is set."""
    if folder is None:
        return _folder(variable)
    found = checked_path(folder, RequestError)
    if not found.is_dir():
        raise RequestError(f"{shown(str(folder))} is not a folder. Relative paths start at {str(Path.cwd())!r}.")
    return found


def _folder(variable: str) -> Path | None:
    """The folder that an environment variable names; None if it is not set."""
    value = os.environ.get(variable)
    if not value:
        return None
    found = checked_path(value, RequestError)
    if not found.is_dir():
        raise RequestError(
            f"{variable} is {shown(value)}, which is not a folder. Correct it, or unset it to use the hub."
        )
    return found


def _hub_records(dataset: str, config: str | None, split: str, remedy: str) -> Iterator[Located]:
    name = dataset if config is None else f"{dataset}/{config}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError(f"Reading {name} from the hub needs `pip install datasets`. {remedy}.") from error
    try:
        rows = load_dataset(dataset, config, split=split)
    except Exception as error:
        # The hub client raises its own errors, those of requests or httpx, OSError and ValueError, depending on its
        # version.
        why = reason(error).rstrip(".")
        raise RequestError(f"Cannot load {name} (split {split!r}) from the hub: {why}. {remedy}.") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        name="tofu",
        title="invented biographies of authors (TOFU)",
        paper="Maini et al. 2024, arXiv 2401.06121",
        read=read_tofu,
    ),
    Benchmark(
        name="return",
        title="facts about real persons (RETURN)",
        paper="Liu et al. 2024, arXiv 2407.10058",
        read=read_return,
    ),
    Benchmark(
        name="counterfact",
        title="relations to edit (CounterFact)",
        paper="Meng et al. 2022, arXiv 2202.05262",
        read=read_counterfact,
    ),
    Benchmark(
        name="zsre",
        title="questions about relations (zsRE)",
        paper="Levy et al. 2017, arXiv 1706.04115",
        read=read_zsre,
    ),
)
"""The benchmarks that come with the package."""

READERS: Mapping[str, Reader] = MappingProxyType({benchmark.name: benchmark.read for benchmark in BENCHMARKS})
"""The readers that come with the package, by prefix."""

BESIDE: Mapping[str, Reader] = MappingProxyType({"tofu": tofu_beside})
"""Readers of the files in which a benchmark keeps paraphrases and wrong answers of its facts, by prefix."""
