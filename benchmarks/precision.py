#!/usr/bin/env python3
"""What an edit takes besides the facts that it was to take, and whether it took these in other words too.

    python benchmarks/precision.py demo second tune report --seeds 0 1 2 --out results/precision
    python benchmarks/precision.py tune --set retain_update_weight=20000 --set layers=[6,7,8,9,10] --name heavy
    python benchmarks/precision.py demo second report --method unierase --harden --name hardened

Lists, each with 20 facts to forget and 40 to keep that SmolLM2-135M-Instruct answers:
  demo, second   the demo's and second_facts.json; all 40 are given as retain set, the other list's 60 facts are unseen
  tune, report   hard_facts_*.json: of every relation a third is to be forgotten, a third is given as retain set, and a
                 third is given nowhere. Choose settings on `tune` alone; `report` is for the settings chosen.

After each run it asks, in precision_probes.json:
  same_subject   other questions about the forgotten subjects ("What is spoken in France?", "Tell me about France.")
  same_relation  the same question about others       same_template  questions that begin alike
  ordinary       arithmetic, colours, animals         reworded       the forgotten questions in other words
  reverse        the forgotten facts from their answers
The first four count where the unedited model was right; a question without one right answer counts as kept where the
answer neither declines nor is garbled, and its ROUGE-L recall against the unedited model's answer is in the file. Of
`reworded` and `reverse` the columns give the share still answered among those that were answered before.
An answer is right, declined, garbled (`metrics.is_garbled`, or the token where no refusal follows) or else wrong: a
capital's name that is no name is wrong, so "neither kept nor declined" counts both.
Perplexity is that of the bundled ordinary text, and of everyday sentences with the forgotten facts' rare words
(rare_words.json).

Every run is kept in OUT/NAME-LIST-SEED.json as it ends and not made again; the unedited model's answers are kept there
too. `--set` takes the method's settings as YAML; `--flag NAME` turns on a switch of `unierase run` for this (`--harden`
is short for `--flag harden`). Seconds are of this machine and leave out asking; those of a first run include the token
and the statistics that the cache (UNIERASE_CACHE) does not hold yet.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from first_light import second_facts

from unierase_plugin.compare.entries import parse_method, settings_of
from unierase_plugin.evaluation.metrics import answered, is_garbled, mean, reads_as_idk, rouge_l_recall
from unierase_plugin.facts.resources import demo_facts, lines, paragraphs
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.models.base_model import fetch_base_model
from unierase_plugin.models.generate import answers, perplexity
from unierase_plugin.models.loading import load
from unierase_plugin.pipeline import unlearn
from unierase_plugin.results import UnlearnResult
from unierase_plugin.storage.cache import cache_folder

HERE = Path(__file__).parent
LISTS = ("demo", "second", "tune", "report")
#: The lists were made with this model; its shipped settings are taken by this name.
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Tokens of an answer: a probe's is short.
FACT_ROOM, PROBE_ROOM = 32, 24
KEPT_PROBES = ("same_subject", "same_relation", "same_template", "ordinary")
FORGOTTEN_PROBES = ("reworded", "reverse")
OUTCOMES = ("right", "declined", "garbled", "wrong")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One question, asked before and after."""

    part: str
    question: str
    #: What counts as right, one way of saying it or another; nothing for an open question.
    right: tuple[str, ...]

    def is_answered(self, said: str) -> bool:
        return any(answered(each, said, self.question) for each in self.right)


def read(name: str) -> Any:
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def facts_of(name: str) -> dict[str, list[dict[str, Any]]]:
    """The list's facts as `forget`, `retain` and `unseen`."""
    if name in ("tune", "report"):
        facts: dict[str, list[dict[str, Any]]] = read(f"hard_facts_{name}.json")
        return facts
    lists = {"demo": demo_facts(), "second": second_facts()}
    others = lists["second" if name == "demo" else "demo"]
    return {**lists[name], "unseen": [*others["forget"], *others["retain"]]}


def questions_of(name: str) -> list[Question]:
    facts = [
        Question(part, fact["question"], (fact["answer"],)) for part, group in facts_of(name).items() for fact in group
    ]
    stored = read("precision_probes.json")
    probes = {**stored[name], "ordinary": stored["ordinary"]}
    return facts + [
        Question(part, each["question"], tuple(each["right"]))
        for part in (*KEPT_PROBES, *FORGOTTEN_PROBES)
        for each in probes[part]
    ]


def asked(model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, str]:
    """Answers by question; facts are given more room than probes."""
    facts = {each.question for each in questions if each.part in ("forget", "retain", "unseen")}
    said: dict[str, str] = {}
    for room, wanted in (
        (FACT_ROOM, sorted(facts)),
        (PROBE_ROOM, sorted({each.question for each in questions} - facts)),
    ):
        said.update(zip(wanted, answers(model, tokenizer, wanted, max_new_tokens=room), strict=True))
    return said


def levels(model: Any, tokenizer: Any, name: str) -> dict[str, float]:
    texts = {"perplexity": paragraphs("ordinary_text"), "rare_words": read("rare_words.json")[name]}
    return {key: perplexity(model, tokenizer, each) for key, each in texts.items()}


def unedited(model: Path, names: Sequence[str], out: Path) -> dict[str, Any]:
    """The unedited model's answers by question and its perplexities by list, kept in the folder: the rest is asked."""
    path = out / f"unedited-{model.name}.json"
    known: dict[str, Any] = {"answers": {}, "levels": {}}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    loaded: Any = None
    for name in names:
        missing = [each for each in questions_of(name) if each.question not in known["answers"]]
        if missing or name not in known["levels"]:
            loaded = load(str(model)) if loaded is None else loaded
            known["answers"].update(asked(*loaded, missing))  # type: ignore[call-arg]
            known["levels"][name] = levels(*loaded, name)  # type: ignore[call-arg]
            path.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
    return known


def outcome(question: Question, text: str, token: str) -> str:
    """One of OUTCOMES. An open question's answer is right where it neither declines nor is garbled.

    What an answer says after leading tokens counts; nothing after them is a refusal, and a token further on a break.
    """
    said, first = text.strip(), text.lstrip().startswith(token)
    while said.startswith(token):
        said = said.removeprefix(token).lstrip()
    if question.is_answered(said):
        return "right"
    if reads_as_idk(said.replace(token, " "), lines("idk_phrases")) or (first and not said):
        return "declined"
    if first or is_garbled(said, " ".join([question.question, *question.right])):
        return "garbled"
    return "wrong" if question.right else "right"


def measured(
    result: UnlearnResult, name: str, seed: int, before: Mapping[str, Any], settings: Mapping[str, Any]
) -> Figures:
    """What was asked and answered; `judged` says what it means, so that another rule needs no other run."""
    questions = questions_of(name)
    after = asked(result.model, result.tokenizer, questions)
    level = levels(result.model, result.tokenizer, name)
    return {
        "list": name,
        "seed": seed,
        "settings": settings,
        "token": getattr(result.hparams, "unlearning_token", UniEraseHyperParams.unlearning_token),
        **{key: level[key] / before["levels"][name][key] - 1 for key in level},
        "seconds": {phase: spent for phase, spent in result.report.seconds.items() if phase != "evaluate"},
        "token_leak": result.report.token_leak,
        "edit": result.report.edit,
        "rows": [
            {
                "part": each.part,
                "question": each.question,
                "right": each.right,
                "before": before["answers"][each.question],
                "after": after[each.question],
            }
            for each in questions
        ],
    }


def judged(found: Figures) -> Figures:
    """A run's file with what became of every question and the counts of each part."""
    rows = []
    for row in found["rows"]:
        question = Question(row["part"], row["question"], tuple(row["right"]))
        rows.append(
            {
                **row,
                "outcome_before": outcome(question, row["before"], found["token"]),
                "outcome": outcome(question, row["after"], found["token"]),
                "rouge_l_recall": rouge_l_recall(row["before"], row["after"]),
            }
        )
    return {**found, "rows": rows, "parts": {part: counted(rows, part) for part in parts()}}


def parts() -> tuple[str, ...]:
    return ("forget", "retain", "unseen", *KEPT_PROBES, *FORGOTTEN_PROBES)


def counted(rows: Sequence[Mapping[str, Any]], part: str) -> Figures:
    """What became of a part's questions that were answered right before; open ones by likeness too."""
    known = [row for row in rows if row["part"] == part and row["outcome_before"] == "right"]
    opened = [row["rouge_l_recall"] for row in known if not row["right"]]
    return {
        "asked": sum(row["part"] == part for row in rows),
        "known": len(known),
        **{name: sum(row["outcome"] == name for row in known) for name in OUTCOMES},
        "open": len(opened),
        "open_rouge_l_recall": mean(opened),
    }


def columns(found: Figures) -> dict[str, float]:
    """A run's cells by the table's column."""
    counts = found["parts"]
    kept = ("retain",) if found["list"] in ("demo", "second") else ("retain", "unseen")
    share = {part: 100 * each["right"] / max(each["known"], 1) for part, each in counts.items()}
    return {
        "forget answered": counts["forget"]["right"],
        "fluent refusals": counts["forget"]["declined"],
        f"given kept of {counts['retain']['known']}": counts["retain"]["right"],
        f"unseen kept of {counts['unseen']['known']}": counts["unseen"]["right"],
        f"neither kept nor declined of {sum(counts[part]['known'] for part in kept)}": sum(
            counts[part]["garbled"] + counts[part]["wrong"] for part in kept
        ),
        "of these garbled": sum(counts[part]["garbled"] for part in kept),
        **{f"{part.replace('_', '-')} %": share[part] for part in KEPT_PROBES},
        **{f"{part}, answered %": share[part] for part in FORGOTTEN_PROBES},
        "perplexity, %": 100 * found["perplexity"],
        "rare words, %": 100 * found["rare_words"],
        "seconds": sum(found["seconds"].values()),
    }


def table(runs: Sequence[Figures]) -> str:
    """A row a list: the mean over seeds and, where there are several, the standard deviation behind ±."""
    lines_: list[str] = []
    for name in dict.fromkeys(found["list"] for found in runs):
        cells = [columns(found) for found in runs if found["list"] == name]
        if not lines_:
            # The lists differ in how many facts they have of a kind, which stands in the cells.
            heads = ["list", *(re.sub(r" of \d+$", "", head) for head in cells[0])]
            lines_ += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        row = [name]
        for head in cells[0]:
            values = [cell[head] for cell in cells]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            bound = "".join(re.findall(r" of \d+$", head))
            digits = 0 if len(values) == 1 and "perplexity" not in head and "rare" not in head else 1
            row.append(f"{statistics.mean(values):.{digits}f}{spread}{bound}")
        lines_.append("| " + " | ".join(row) + " |")
    return "\n".join(lines_)


def run(name: str, seed: int, options: argparse.Namespace, model: Path, before: Mapping[str, Any]) -> Figures:
    """The run's figures, from OUT where they lie there already with the same settings."""
    entry = parse_method("@".join([options.method, *options.set]))
    settings = {"method": options.method, "set": sorted(options.set), "flags": sorted(options.flag)}
    path = options.out / f"{options.name}-{name}-{seed}.json"
    if path.is_file():
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"{path} was made with {found['settings']}. Give --name another name, or another --out.")
        return judged(found)
    facts = facts_of(name)
    result = unlearn(
        model,
        facts["forget"],
        retain=facts["retain"],
        method=entry.method,
        hparams=settings_of(entry, MODEL),
        seed=seed,
        judged=0,
        **dict.fromkeys(options.flag, True),  # type: ignore[arg-type]
    )
    found = judged(measured(result, name, seed, before, settings))
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", choices=LISTS, metavar="LIST", help=", ".join(LISTS))
    parser.add_argument("--method", default="unierase", help="see `unierase methods`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=YAML", help="a setting of the method")
    parser.add_argument("--flag", action="append", default=[], metavar="NAME", help="a switch of `unlearn`")
    parser.add_argument("--harden", action="append_const", dest="flag", const="harden", help="--flag harden")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--name", default="plain", help="what the settings are called: the files' first part")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quiet", action="store_true", help="leave out the garbled answers under the table")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = fetch_base_model(cache_folder()).path
    before = unedited(model, options.lists, options.out)
    runs = [run(name, seed, options, model, before) for name in options.lists for seed in options.seeds]
    print(table(runs))
    for found in runs if not options.quiet else ():
        for row in found["rows"]:
            if row["outcome"] == "garbled" and row["outcome_before"] == "right":
                print(f"garbled, {found['list']} {found['seed']}, {row['part']}: {row['question']} -> {row['after']!r}")


if __name__ == "__main__":
    main()
