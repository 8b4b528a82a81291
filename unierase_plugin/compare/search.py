"""Tuning that is the same for all methods: small stated spaces, one budget of tries, one rule of choice."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..hparams import UniEraseHyperParams
from ..methods.finetuning.settings import PreferenceHyperParams, RMUHyperParams, TrainingHyperParams, UNDIALHyperParams
from ..methods.lunar import LUNARHyperParams
from ..methods.removal.method import RemovalHyperParams
from ..storage.fingerprints import plain
from .entries import Entry, method_of

#: The values of each setting that may be tried.
Space = Mapping[str, Sequence[Any]]

RULE = (
    "The try that leaves least at equal retention is taken. What is left is the mean of ROUGE-L recall, probability "
    "and extraction strength on the validation facts to forget. A try that keeps less than the target on the "
    "validation facts to keep is first mixed back to it. Without bisections only tries that keep enough by themselves "
    "count; if none does, the one that keeps most is taken."
)

_RATES = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 3e-4)


def search_space(entry: Entry, depth: int) -> Space:
    """The settings that are searched for a method, by the class of its hyper-parameters. Controls have none.

    depth: the number of the model's blocks, which places the edited ones. Settings that were set by hand are left out.
    """
    kind = method_of(entry).hparams
    space: dict[str, Sequence[Any]] = {}
    if issubclass(kind, RMUHyperParams):
        space = {
            "learning_rate": (5e-5, 2e-4, 1e-3),
            "steering": (6.5, 20.0, 65.0),
            "retain_weight": (1.0, 100.0, 1200.0),
        }
    elif issubclass(kind, UNDIALHyperParams):
        space = {"learning_rate": _RATES, "strength": (3.0, 10.0, 30.0), "retain_weight": (0.0, 1.0)}
    elif issubclass(kind, TrainingHyperParams):
        space = {"learning_rate": _RATES, "retain_weight": (1.0, 2.0, 5.0)}
        if issubclass(kind, PreferenceHyperParams):
            beta = kind().beta
            space["beta"] = (beta, beta / 3, beta * 3)
    elif issubclass(kind, LUNARHyperParams):
        space = {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2), "coefficient": (1.0, 2.0, 4.0)}
    elif issubclass(kind, RemovalHyperParams):
        space = {
            "removal_teacher_probability": (0.02, 0.05, 0.1),
            "removal_passes": (2, 4, 6),
            "removal_retain_weight": (4.0, 40.0, 400.0),
        }
    elif issubclass(kind, UniEraseHyperParams):
        space = {"clamp_norm_factor": (0.75, 1.0, 2.0, 4.0), "layers": _places(depth, kind().solver == "exact")}
        weight = {"ridge": "mom2_update_weight", "null_space": "L2"}.get(kind().solver)
        if weight:
            space[weight] = (
                (20.0, 200.0, 2000.0, 15000.0) if weight == "mom2_update_weight" else (0.1, 1.0, 10.0, 100.0)
            )
    return {name: values for name, values in space.items() if name not in entry.changes}


def _places(depth: int, single: bool) -> list[list[int]]:
    """Blocks to edit: first an empty list (the method's own), then up to a quarter, a third and half of the depth."""
    found: list[list[int]] = [[]]
    for share in (1 / 4, 1 / 3, 1 / 2):
        last = min(max(round(depth * share), 0), max(depth - 2, 0))
        first = last if single else max(0, last - max(1, round(depth / 8)))
        if (run := list(range(first, last + 1))) not in found:
            found.append(run)
    return found


def tries(space: Space, published: Mapping[str, Any], budget: int, seed: int) -> list[dict[str, Any]]:
    """At most `budget` different settings: first the published ones, an empty change, then drawn ones.

    published: the published settings, by name.
    """
    if not space:
        return []
    known = {name: plain(published[name]) for name in space}
    everything = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    everything = [each for each in everything if each != known]
    drawn = random.Random(seed).sample(everything, min(len(everything), max(0, budget - 1)))
    return [{}, *drawn][:budget]


def choose(outcomes: Sequence[Mapping[str, Any] | None], target: float) -> int | None:
    """The number of the try that is taken (RULE); None if all failed.

    outcomes: `left` and `retention` of each try; None for a try that failed.
    """
    # No comparison with NaN holds, so a try without a figure could come out on top.
    known = [None if each is None or math.isnan(each["retention"] + each["left"]) else each for each in outcomes]
    worked = [(index, each) for index, each in enumerate(known) if each is not None]
    if not worked:
        return None
    enough = [(index, each) for index, each in worked if each["retention"] >= target]
    if enough:
        return min(enough, key=lambda pair: (pair[1]["left"], -pair[1]["retention"]))[0]
    return max(worked, key=lambda pair: pair[1]["retention"])[0]
