"""Forget requests from where people keep them: TOFU, RETURN, CounterFact, zsRE, JSON, JSON lines and CSV.

`read_requests` is the one door. What stands before the colon of a spec picks a reader from a mapping that is passed in,
so that a plug-in adds one without any module being changed. A refusal names the file and the line it concerns.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import DependencyError, RequestError, did_you_mean, first_words, listed, reason, shown
from .inputs import checked_path, parse_json, read_text
from .request import ForgetRequest, has_word

Reader = Callable[[str], Sequence[ForgetRequest]]
"""Takes what follows the colon of a spec, slice removed; returns requests or raises `RequestError`."""

Record = Mapping[str, Any]
Located = tuple[str, Record]
"""Where a record was found (`forget01.json, line 3`), and the record."""

TOFU_SPLITS = (
    *("forget01", "forget05", "forget10", "retain90", "retain95", "retain99", "full", "real_authors", "world_facts"),
    *("forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed"),
    *("real_authors_perturbed", "world_facts_perturbed"),
)
"""The configurations of `locuslab/TOFU` (Maini et al. 2024, arXiv 2401.06121)."""

RETURN_SPLITS = ("forget", "retain", "forget_train", "forget_eval", "retain_train", "retain_eval")
"""Sets of RETURN (Liu et al. 2024, arXiv 2407.10058); its authors halve each of the first two into train and eval."""

#: How a message calls a fact of a list at hand, with its number in it.
AT_HAND = "request"

FILE_SUFFIXES = (".json", ".jsonl", ".csv")

_SLICE = re.compile(r"\[(-?\d{1,18}|):(-?\d{1,18}|)\]$")
# Two letters at least: `C:` before a path is a drive.
_PREFIX = re.compile(r"([A-Za-z][\w-]+):(.*)", re.DOTALL)


def read_requests(
    spec: str | os.PathLike[str] | Iterable[ForgetRequest | Record],
    readers: Mapping[str, Reader] | None = None,
) -> tuple[ForgetRequest, ...]:
    """Read the requests that `spec` names, in order; subjects that are not given stay None.

    `spec` is a string such as `tofu:forget01`, `return:forget`, `counterfact:FILE`, `counterfact:hub`, `zsre:FILE` or
    `facts.csv`, any of them with a slice at its end (`tofu:forget10[:20]`, `[20:40]`, `[-5:]`); or a path object; or
    requests, or mappings with their fields, that are at hand already. `readers` (default `READERS`) maps the part
    before the colon to a function. A missing `case_id` becomes `<file stem or split>-<index>`, counted before slicing.

    Raises `RequestError` when a name, file, line, field or slice is not usable, and when nothing is left to return.
    """
    if isinstance(spec, (ForgetRequest, Mapping, bytes)) or not isinstance(spec, (str, os.PathLike, Iterable)):
        raise RequestError(
            f"Expected a spec, a path or a list of requests, got {first_words(spec)}; put one request in a list."
        )
    if isinstance(spec, str):
        requests = _read_spec(spec, READERS if readers is None else readers)
    elif isinstance(spec, os.PathLike):
        requests = read_file(os.fspath(spec))
    else:
        requests = build_requests(((f"{AT_HAND} {i}", each) for i, each in enumerate(spec)), stem="request")
    if not requests:
        raise RequestError(f"{shown(spec)} holds no requests.")
    return requests


def _read_spec(spec: str, readers: Mapping[str, Reader]) -> tuple[ForgetRequest, ...]:
    source, bounds = _split_slice(spec.strip())
    prefixed = _PREFIX.fullmatch(source)
    if prefixed is None or prefixed[1] not in readers:
        checked_path(source, RequestError)
    if prefixed is None or (prefixed[1] not in readers and Path(source).exists()):
        requests = read_file(source)
    elif prefixed[1] in readers:
        requests = _with_case_ids(readers[prefixed[1]](prefixed[2]), stem=prefixed[1])
    else:
        raise RequestError(
            f"Unknown prefix {shown(prefixed[1])} in the spec {shown(spec)}.{did_you_mean(prefixed[1], readers)} "
            f"Known: {', '.join(sorted(readers))}, or a path that ends in {', '.join(FILE_SUFFIXES)}."
        )
    if requests and not requests[bounds]:
        raise RequestError(f"The slice of {shown(spec)} selects none of its {len(requests)} requests.")
    return requests[bounds]


def _split_slice(spec: str) -> tuple[str, slice]:
    found = _SLICE.search(spec)
    if found:
        start, stop = (int(bound) if bound else None for bound in found.groups())
        return spec[: found.start()], slice(start, stop)
    if spec.endswith("]") and not checked_path(spec, RequestError).exists():
        raise RequestError(f"The slice at the end of {shown(spec)} is not [start:stop]: write [0:20], [:20] or [-5:].")
    return spec, slice(None)


def spec_path(spec: Any) -> Path | None:
    """The file or folder that a spec, a model or a setting names, without prefix and slice; None without one."""
    if not isinstance(spec, (str, os.PathLike)):
        return None
    text = _SLICE.sub("", str(spec).strip())
    prefixed = _PREFIX.fullmatch(text)
    names = (str(spec), text, prefixed[2] if prefixed else "")
    return next((Path(name) for name in names if name and os.path.exists(os.path.expanduser(name))), None)


# --- Records to requests -------------------------------------------------------------------------------------------


def build_requests(records: Iterable[tuple[str, ForgetRequest | Record]], stem: str) -> tuple[ForgetRequest, ...]:
    """Turn located records with `question`, `answer` and optionally `subject`, `case_id` and `target` into requests.

    Other fields are ignored: benchmarks carry many. Raises `RequestError` with the record's place.
    """
    return _with_case_ids([_placed(where, _build_request(where, record)) for where, record in records], stem)


def _placed(where: str, request: ForgetRequest) -> ForgetRequest:
    # A fact of a list at hand is called by its number.
    return request if where.startswith(AT_HAND) or request.place else replace(request, place=where)


def _build_request(where: str, record: ForgetRequest | Record) -> ForgetRequest:
    if isinstance(record, ForgetRequest):
        return record
    if not isinstance(record, Mapping):
        raise RequestError(f"{where}: expected an object with 'question' and 'answer', got {first_words(record)}.")
    question, answer = _field(where, record, "question"), _field(where, record, "answer")
    case_id: Any = record.get("case_id")
    try:
        # CounterFact numbers its cases.
        name = str(case_id) if type(case_id) is int else case_id
        return ForgetRequest(question, answer, record.get("subject"), name, record.get("target"))
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _field(where: str, record: Record, name: str) -> Any:
    """The value of a field that must be there; its type is left to `ForgetRequest`."""
    if not isinstance(record, Mapping) or record.get(name) is None:
        keys = [key for key in record if isinstance(key, str)] if isinstance(record, Mapping) else []
        raise RequestError(
            f"{where}: the field {name!r} is missing.{did_you_mean(name, [k for k in keys if k != name])} "
            f"Present: {listed(keys)}."
        )
    return record[name]


def _with_case_ids(requests: Iterable[ForgetRequest], stem: str) -> tuple[ForgetRequest, ...]:
    return tuple(
        request if request.case_id is not None else replace(request, case_id=f"{stem}-{index}")
        for index, request in enumerate(requests)
    )


# --- Files ---------------------------------------------------------------------------------------------------------


def read_file(path: str | os.PathLike[str]) -> tuple[ForgetRequest, ...]:
    """Read requests from a .json (a list, or JSON lines), .jsonl or .csv file."""
    return build_requests(iter_records(path), Path(path).stem)


def iter_records(path: str | os.PathLike[str]) -> Iterator[Located]:
    """Yield the records of a file with their places, whatever their fields.

    Raises `RequestError` when there is no such file, its suffix is not one of `FILE_SUFFIXES`, or it cannot be parsed.
    """
    path = checked_path(path, RequestError)
    if path.suffix.lower() not in FILE_SUFFIXES:
        raise RequestError(
            f"Cannot tell the format of {shown(str(path))}: give a path that ends in {', '.join(FILE_SUFFIXES)}, or a "
            f"spec with a prefix ({', '.join(sorted(READERS))})."
        )
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


def _json_list_records(path: Path, text: str) -> Iterator[Located]:
    for number, record in enumerate(_parse_json(path, text, 1), start=1):
        yield f"{path}, item {number}", record


def _json_line_records(path: Path, text: str) -> Iterator[Located]:
    # Not splitlines(): JSON strings may hold U+2028 and its kin unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parse_json(path, line, number)


def _parse_json(path: Path, text: str, first_line: int) -> Any:
    return parse_json(
        text, str(path), RequestError, " Expected a list of objects, or one object on each line.", first_line
    )


def _csv_records(path: Path, text: str) -> Iterator[Located]:
    """Rows are numbered as a spreadsheet shows them: the header is row 1. Empty cells count as not given."""
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
                    f"{path}, row {number}: more cells than the header has columns ({first_words(row[None][0])} is "
                    f"left over). Quote cells that hold commas."
                )
            yield f"{path}, row {number}", {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise RequestError(f"{path}, row {number + 1}: malformed CSV ({error}).") from error


# --- Benchmarks ----------------------------------------------------------------------------------------------------


def read_tofu(split: str) -> tuple[ForgetRequest, ...]:
    """Read a TOFU split from the folder in `UNIERASE_TOFU_DIR`, laid out as on the hub, or else from the hub.

    Where the folder holds `<split>_subject.json` (for the forget sets also `forget10_subject.json`, which covers them),
    subjects are taken from it by question.
    """
    records = tofu_records(split)
    folder = _folder("UNIERASE_TOFU_DIR")
    if folder is None:
        return build_requests(records, split)
    subjects = _tofu_subjects(folder, split)
    return build_requests(
        ((where, {"subject": subjects.get(str(_field(where, each, "question"))), **each}) for where, each in records),
        split,
    )


def tofu_records(split: str, folder: str | os.PathLike[str] | None = None) -> Iterator[Located]:
    """The records of a TOFU split with all their fields, wrong and paraphrased answers too.

    From `folder`, else from that in `UNIERASE_TOFU_DIR`, both laid out as on the hub, else from the hub.
    """
    _check_name("TOFU split", split, TOFU_SPLITS)
    found = _given_folder(folder, "UNIERASE_TOFU_DIR")
    if found is not None:
        return iter_records(found / f"{split}.json")
    remedy = f"Put its files ({split}.json as JSON lines) in a folder and set UNIERASE_TOFU_DIR to it"
    return _hub_records("locuslab/TOFU", split, "train", remedy)


def _tofu_subjects(folder: Path, split: str) -> dict[str, str]:
    names = [f"{split}_subject.json", *(["forget10_subject.json"] if split.startswith("forget") else [])]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return {}
    return {_field(*each, "question"): _field(*each, "subject") for each in iter_records(path)}


def read_return(split: str) -> tuple[ForgetRequest, ...]:
    """Read a set of RETURN from `UNIERASE_RETURN_DIR` (`<split>.jsonl` or `.json`), or else from the hub.

    Records are questions and answers, or persons as its authors publish them: `name`, and under `data` a list with
    `question` and `gold_answer`. A person's name is the subject where the question has it.
    """
    return build_requests(return_records(split), split)


def return_records(
    split: str, folder: str | os.PathLike[str] | None = None, perturbed: bool = False
) -> Iterator[Located]:
    """The records of a set of RETURN, persons taken apart into questions, all fields of questions and answers kept.

    From `folder`, else from that in `UNIERASE_RETURN_DIR`, else from the hub. `perturbed` prefers the file that holds
    wrong answers too, as Yuan et al. 2024 (arXiv 2410.08109) publish them: `<split>_perturbed.json`, and
    `neighbor_perturbed.json` for what is to be kept.
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
            question = _field(place, pair, "question")
            # A short name may also stand inside a longer word, which is not about the person.
            named = isinstance(name, str) and isinstance(question, str) and has_word(question, name)
            yield (
                place,
                {
                    "question": question,
                    "answer": _field(place, pair, "gold_answer"),
                    "subject": name if named else None,
                },
            )


def read_counterfact(source: str) -> tuple[ForgetRequest, ...]:
    """Read CounterFact (Meng et al. 2022, arXiv 2202.05262) from a file, or from the hub when `source` is `hub`.

    The question is the rewrite's prompt with its subject put in; what is to be forgotten is the true target.
    """
    if source == "hub":
        remedy = "Download counterfact.json and give its path: counterfact:counterfact.json"
        records = _hub_records("azhx/counterfact", None, "train+test", remedy)
        return build_requests(map(_counterfact_record, records), "counterfact")
    return build_requests(map(_counterfact_record, iter_records(source)), Path(source).stem)


def _counterfact_record(located: Located) -> Located:
    where, record = located
    rewrite = _field(where, record, "requested_rewrite")
    prompt, subject = _field(where, rewrite, "prompt"), _field(where, rewrite, "subject")
    if not isinstance(prompt, str) or not isinstance(subject, str) or "{}" not in prompt:
        raise RequestError(
            f"{where}: expected a 'prompt' with {{}} and a 'subject', got "
            f"{first_words(prompt)} and {first_words(subject)}."
        )
    answer = _field(where, _field(where, rewrite, "target_true"), "str")
    # Not str.format: a prompt may hold braces of its own.
    question = prompt.replace("{}", subject, 1)
    return where, {"question": question, "answer": answer, "subject": subject, "case_id": record.get("case_id")}


def read_zsre(source: str) -> tuple[ForgetRequest, ...]:
    """Read zsRE in the layout of MEND and EasyEdit from a file: `src`, `subject`, and `answers` or else `alt`.

    The first of `answers` is the true answer, which is what can be forgotten; `alt` is an editing target.
    """
    return build_requests(map(_zsre_record, iter_records(source)), Path(source).stem)


def _zsre_record(located: Located) -> Located:
    where, record = located
    question, subject = _field(where, record, "src"), _field(where, record, "subject")
    answers = record.get("answers")
    answer = answers[0] if isinstance(answers, list) and answers else answers or _field(where, record, "alt")
    return where, {"question": question, "answer": answer, "subject": subject, "case_id": record.get("case_id")}


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise RequestError(f"Unknown {what} {shown(name)}.{did_you_mean(name, known)} Known: {', '.join(known)}.")


def _given_folder(folder: str | os.PathLike[str] | None, variable: str) -> Path | None:
    """The folder that is given, else the one that an environment variable names, None where neither is set."""
    if folder is None:
        return _folder(variable)
    found = checked_path(folder, RequestError)
    if not found.is_dir():
        raise RequestError(f"{shown(str(folder))} is not a folder. Relative paths start at {str(Path.cwd())!r}.")
    return found


def _folder(variable: str) -> Path | None:
    """The folder that an environment variable names, None where it is not set."""
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
        # The hub client raises its own kinds, those of requests or httpx, OSError and ValueError, by version.
        why = reason(error).rstrip(".")
        raise RequestError(f"Cannot load {name} (split {split!r}) from the hub: {why}. {remedy}.") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows))


READERS: Mapping[str, Reader] = MappingProxyType(
    {"tofu": read_tofu, "return": read_return, "counterfact": read_counterfact, "zsre": read_zsre}
)
"""The readers that come with the package, by prefix."""
