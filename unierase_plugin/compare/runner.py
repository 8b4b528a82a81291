"""Plans the runs of a comparison, makes those that are missing, and writes tables, charts and page."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UniEraseError, shown
from ..facts.readers import Requests
from ..facts.request import check_overlap
from ..methods.contract import Progress
from ..models.disk_space import weights_size
from ..models.loading import check_stated_blocks, read_config
from ..plugins.registration import answer_metrics
from ..settings.values import checked_seed
from ..storage.atomic import check_disk_space, clear_strays, make_folder, write_json
from ..storage.results_folder import results_folder
from . import search
from .entries import REFERENCE, UNEDITED, Entry, settings_of
from .facts import at_most, divide, read_facts, records
from .figures import left, retention
from .launch import Launcher, in_a_process
from .results import gather
from .stages import FAILED, JOB, MethodRun, Stages, read_json

logger = logging.getLogger(__name__)

#: Files of a comparison whose names other files may have.
WRITTEN = ("facts.json", "results.json", "table.md", "table.tex", "report.html")
SCENARIOS = ("batch", "sequential", "precise")


@dataclass(frozen=True)
class Options:
    """How a comparison is made. The defaults are those of `unierase compare`."""

    scenario: str = "batch"
    #: Parts of the sequential scenario.
    steps: int = 10
    #: How many settings are tried for each method. 0 takes the published ones.
    budget: int = 0
    seeds: tuple[int, ...] = (0,)
    #: The share of each set of facts on which settings and alpha are chosen.
    validation: float = 0.25
    #: The retention, relative to before, that a try should keep, and at which methods are matched.
    target: float = 0.95
    #: Steps of the bisection that finds equal retention. 0 leaves it out.
    bisections: int = 5
    #: At most so many facts of each set are asked. 0 asks all.
    limit: int = 0
    #: lm-eval tasks of general ability. "auto" takes `tofu_utility` for the facts of TOFU, and no task for others.
    utility: tuple[str, ...] = ("auto",)
    utility_limit: int = 60
    #: Attacks of the audit.
    audit: tuple[str, ...] = ()
    #: Registered metrics that are measured beside the columns that are always there.
    metrics: tuple[str, ...] = ()
    corpus: str = ""
    device: str = ""
    dtype: str = ""
    max_batch_tokens: int = 0
    batch_size: int = 0
    #: Whether methods share statistics and tokens. That is quicker, but times then depend on the order.
    shared_cache: bool = False
    keep_models: bool = False
    #: Whether runs that failed before are tried again.
    retry: bool = False

    def check(self) -> None:
        """Raises UniEraseError for a value that is not possible."""
        if self.scenario not in SCENARIOS:
            raise UniEraseError(
                f"scenario = {shown(self.scenario)} is not known. Choose one of: {', '.join(SCENARIOS)}."
            )
        if not self.seeds:
            raise UniEraseError("There are no seeds. Give at least one, such as 0.")
        for seed in self.seeds:
            checked_seed(seed)
        for name, low, high in (("validation", 0.0, 0.9), ("target", 0.0, 1.0)):
            if not low < getattr(self, name) <= high:
                raise UniEraseError(f"{name} = {getattr(self, name)} must be above {low} and at most {high}.")
        for name in ("budget", "bisections", "limit", "utility_limit", "max_batch_tokens", "batch_size"):
            if getattr(self, name) < 0:
                raise UniEraseError(f"{name} = {getattr(self, name)} must not be negative.")
        answer_metrics(self.metrics)
        if self.steps < 1:
            raise UniEraseError(f"steps = {self.steps} must be at least 1.")


@dataclass
class _Plan:
    """The state of a running comparison."""

    model: str
    reference: str
    out: Path
    options: Options
    facts: Mapping[str, Any]
    launch: Launcher
    progress: Progress
    #: The tries of each method, by label: settings and outcomes.
    searches: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: Runs that are reported, in the order of the rows.
    runs: list[tuple[Entry, MethodRun, Path]] = field(default_factory=list)
    done: int = 0
    expected: int = 1


def compare(
    model: str,
    forget: Requests,
    entries: Sequence[Entry],
    *,
    out: Path,
    retain: Requests | None = None,
    allow_overlap: bool = False,
    reference: str = "",
    options: Options | None = None,
    launch: Launcher = in_a_process,
    progress: Progress = lambda phase, share, note: None,
) -> dict[str, Any]:
    """Compares methods and writes `results.json`, `table.md`, `table.tex`, charts and `report.html` into `out`.

    A stopped comparison goes on when it is called again with the same arguments. A method that fails has a row that
    says so.

    Args:
        model: Folder or hub id of the model that knows the facts.
        forget: The facts to forget.
        entries: The methods (`entries.parse_methods`). The unedited model is always a row.
        out: The output folder.
        retain: The facts to keep.
        allow_overlap: Whether a fact may be in both sets.
        reference: A model that was trained on the same data without the facts to forget. Forget quality needs it.
        options: What is run and measured. Without it, the defaults.
        launch: Runs one method. By default in a process of its own.
        progress: Called with a phase, the share that is done, and a note.

    Returns:
        What results.json holds.

    Raises:
        UniEraseError: If the comparison cannot start, for example because another process writes into `out`.
    """
    options = options or Options()
    options.check()
    settings = [settings_of(entry, model) for entry in entries]
    with results_folder(out, WRITTEN, _began):
        make_folder(out)
        clear_strays(out)
        plan = _Plan(
            model=model,
            reference=reference,
            out=out,
            options=options,
            facts=_facts(forget, retain, options, allow_overlap),
            launch=launch,
            progress=progress,
        )
        for each in settings:
            check_stated_blocks(model, each)
        write_json(out / "facts.json", plan.facts)
        plan = replace(plan, options=_with_utility(options, forget))
        methods = [entry for entry in entries if entry.method not in (UNEDITED, REFERENCE)]
        plan.expected = 1 + bool(reference) + len(methods) * (len(options.seeds) + options.budget)
        _check_disk_space(plan, len(methods), len(methods) * (len(options.seeds) + options.budget))
        ratios = _control(plan, REFERENCE, "", "") if reference else None
        before = _control(plan, UNEDITED, "", _raw(ratios))
        if read_json(before / FAILED):
            raise UniEraseError(f"The unedited model cannot be measured: {read_json(before / FAILED)['error']}")
        _write_before(before)
        for entry in methods:
            _method(plan, entry, before, _raw(ratios))
        return gather(plan.out, _described(plan), plan.runs, plan.searches, plan.facts)


def _began(out: Path) -> bool:
    """Whether a comparison was begun in the folder."""
    facts = read_json(out / "facts.json")
    return isinstance(facts, dict) and "forget_shown" in facts


def _check_disk_space(plan: _Plan, methods: int, runs: int) -> None:
    """Raises WriteError if the disk has no room for the models that will exist at the same time."""
    # Each step starts from the model of the step before, which is removed afterwards.
    at_once = min(methods, 2 if plan.options.scenario == "sequential" else 1)
    if plan.options.keep_models and plan.options.scenario != "precise":
        at_once = max(at_once, runs - len(list(plan.out.glob("cells/*/model*"))))
    check_disk_space(plan.out / "cells", at_once * weights_size(plan.model, plan.options.dtype))


def _facts(forget: Requests, retain: Requests | None, options: Options, allow_overlap: bool) -> dict[str, Any]:
    """All facts, which the methods get, and the parts of them that are asked."""
    facts, kept = read_facts(forget), () if retain is None else read_facts(retain, first=True)
    if not allow_overlap:
        check_overlap(facts, kept)
    tuned = options.budget > 0 and options.scenario == "batch"
    parts: dict[str, Any] = {"forget": records(facts), "keep": records(kept)}
    for name, divided in (("forget", tuned), ("keep", True)):
        validation, rest = divide(parts[name], options.validation if divided else 0.0, 0)
        parts[f"{name}_validation"] = at_most(validation, options.limit, 0)
        parts[f"{name}_shown"] = at_most(rest, options.limit, 0)
    return parts


def _with_utility(options: Options, forget: Requests) -> Options:
    if options.utility != ("auto",):
        return options
    tofu = isinstance(forget, str) and forget.startswith("tofu:")
    return replace(options, utility=("tofu_utility",) if tofu else ())


def _raw(folder: Path | None) -> str:
    """The file of the reference's figures; "" if it could not be measured."""
    return str(folder / "raw.json") if folder is not None and (folder / "raw.json").exists() else ""


def _write_before(folder: Path) -> None:
    """Writes the figures of the unedited model, with which methods are compared, into one file."""
    stages = Stages(folder)
    write_json(folder / "before.json", {name: stages[name] for name in ("validation", "raw")})


def _control(plan: _Plan, name: str, before: str, ratios: str) -> Path:
    entry = Entry(name, name)
    run = _method_run(plan, entry, seed=plan.options.seeds[0], before=before, ratios=ratios)
    folder = _made(plan, run)
    plan.runs.append((entry, run, folder))
    return folder


def _method(plan: _Plan, entry: Entry, before: Path, ratios: str) -> None:
    chosen: Mapping[str, Any] = {}
    kept = str(before / "before.json")
    if plan.options.budget and plan.options.scenario == "batch":
        found = _search(plan, entry, kept, read_json(before / "before.json")["validation"]["keep"])
        plan.searches[entry.label] = found
        chosen = found["tries"][found["chosen"]]["settings"] if found["chosen"] is not None else {}
    # A control has nothing random.
    for seed in plan.options.seeds[: 1 if entry.is_control else None]:
        run = _method_run(plan, entry, tried=chosen, seed=seed, before=kept, ratios=ratios)
        plan.runs.append((entry, run, _made(plan, run)))


def _search(plan: _Plan, entry: Entry, before: str, kept: Mapping[str, float | None]) -> dict[str, Any]:
    """Makes the tries of a method, and chooses one by the validation parts at equal retention."""
    space = search.search_space(entry, _depth(plan.model))
    published = settings_of(entry, plan.model).as_dict()
    tried = search.tries(space, published, plan.options.budget, plan.options.seeds[0])
    outcomes: list[dict[str, Any] | None] = []
    listed: list[dict[str, Any]] = []
    for settings in tried:
        run = _method_run(
            plan, entry, tried=settings, is_try=True, seed=plan.options.seeds[0], before=before, ratios=""
        )
        folder = _made(plan, run)
        failed = read_json(folder / FAILED)
        outcome = _outcome(Stages(folder), kept) if failed is None else None
        outcomes.append(outcome)
        listed.append({"settings": settings, **(outcome or {"error": failed["error"] if failed else "not measured"})})
    return {
        "space": {name: list(values) for name, values in space.items()},
        "tries": listed,
        "chosen": search.choose(outcomes, plan.options.target),
        "rule": search.RULE,
    }


def _outcome(stages: Stages, kept: Mapping[str, float | None]) -> dict[str, Any] | None:
    """What a try leaves and keeps: the whole edit if it keeps enough, else at equal retention. None if not measured."""
    measured, matched = stages["validation"], stages["matched"]
    if measured is None:
        return None
    raw = retention(measured["keep"], kept)
    if matched is None or matched["alpha"] is None:
        return {"left": left(measured["forget"]), "retention": raw, "alpha": 1.0, "retention_raw": raw}
    return {
        "left": left(matched["forget"]),
        "retention": matched["retention_validation"],
        "alpha": matched["alpha"],
        "retention_raw": raw,
    }


def _depth(model: str) -> int:
    return int(read_config(model).get_text_config().num_hidden_layers)


def _method_run(
    plan: _Plan,
    entry: Entry,
    *,
    tried: Mapping[str, Any] = MappingProxyType({}),
    is_try: bool = False,
    seed: int,
    before: str,
    ratios: str,
) -> MethodRun:
    options = plan.options
    shared = {each.name for each in dataclasses.fields(MethodRun)} & {each.name for each in dataclasses.fields(Options)}
    return MethodRun(
        label=entry.label,
        method=entry.method,
        changes=entry.changes,
        tried=dict(tried),
        is_try=is_try,
        seed=seed,
        model=plan.model,
        facts=str(plan.out / "facts.json"),
        before=before,
        ratios=ratios,
        reference=plan.reference,
        keep_model=options.keep_models,
        **{name: getattr(options, name) for name in shared},
    )


def _made(plan: _Plan, run: MethodRun) -> Path:
    """Makes a run unless it is done or has failed before. Returns its folder."""
    known = hashlib.sha256((plan.out / "facts.json").read_bytes()).hexdigest()
    kind = f"try-{run.seed}" if run.is_try else f"seed-{run.seed}"
    name = re.sub(r"[^\w.-]+", "-", run.label)[:60]
    folder = plan.out / "cells" / f"{name}-{kind}-{run.key(known)}"
    plan.done += 1
    make_folder(folder)
    clear_strays(folder)
    # Nothing can be compared without the unedited model's figures.
    retry = plan.options.retry or run.method == UNEDITED
    if Stages(folder).are_done or (read_json(folder / FAILED) is not None and not retry):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return folder
    write_json(folder / JOB, dataclasses.asdict(run))
    title = f"[{min(plan.done, plan.expected)}/{plan.expected}] {run.label}"
    cache = plan.out / "cache" if plan.options.shared_cache or run.is_try else folder / "cache"
    plan.launch(folder, cache, partial(_titled, plan.progress, f"{title} {'try' if run.is_try else kind}"))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if failed := read_json(folder / FAILED):
        logger.warning("%s failed. Its row says why: %s", run.label, failed["error"])
    return folder


def _titled(progress: Progress, title: str, phase: str, share: float, note: str) -> None:
    progress(title, share, f"{phase} {note}".strip())


def _described(plan: _Plan) -> dict[str, Any]:
    """The setup of the comparison, for results.json and the page."""
    counts = {name: len(facts) for name, facts in plan.facts.items()}
    return {
        "model": plan.model,
        "reference": plan.reference or None,
        "facts": counts,
        "truth_ratio": {
            role: bool(plan.facts[role] and plan.facts[role][0]["perturbed_answer"]) for role in ("forget", "keep")
        },
        **dataclasses.asdict(plan.options),
    }
