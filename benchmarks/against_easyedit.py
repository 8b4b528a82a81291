#!/usr/bin/env python3
"""EasyEdit's AlphaEdit and MEMIT beside our engine: the same requests, blocks, steps, contexts, corpus and model.

    export UNIERASE_EASYEDIT_DIR=.../EasyEdit       # a checkout of its main branch; no packaging of it is needed
    python benchmarks/against_easyedit.py --model DIR --out results [--quick] [PIECE ...]

Pieces, in order: statistics, values, keys, solve, whole, slope, table. Each writes results/<piece>.json when it ends,
so that they can be run one by one; `table` prints all that is there and writes table.md. Both sides run in one process
on as many threads, but for `whole`, where each edit has a process of its own, whose peak memory is read at its end.
EasyEdit is driven through its own functions; its data set is replaced from outside by local texts.

What both sides aim at is a plain sentence (" I don't know."), not an unlearning token. EasyEdit minimises the mean
negative log-likelihood of the target's T tokens. Our values take a first token and what follows it, the latter as a
mean with a weight: with weight T - 1 the sum is T times theirs, so the KL factor, the weight decay and the stopping
loss are multiplied by T, which leaves the objective the same. What differs: EasyEdit stops on the whole loss, we on the
likelihood alone; its learning rate is absolute, ours is in units of each state's root mean square and is converted by
the mean over the requests; Adam's epsilon; EasyEdit takes the mean of the bare prompt and of the mean over contexts as
a request's key, we the mean over all. Twenty steps are 20 passes and 19 updates on both sides.

Every time is taken twice: by the clock, and in seconds of all processors, which other work on the machine disturbs
less (EasyEdit reads its corpus in processes of their own, whose seconds are not counted). EasyEdit's values take long,
so they are measured on the first --their-values requests, and the table says where a total is extrapolated from them.
AlphaEdit and MEMIT share one computation of values.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import reference
from easyedit_host import import_easyedit

from unierase_plugin.evaluation.metrics import answered
from unierase_plugin.facts.resources import demo_facts
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import apply_edit, compute_edit, make_solver
from unierase_plugin.locate_then_edit.keys import KeyStream
from unierase_plugin.locate_then_edit.positions import Prompt, locate_in_text
from unierase_plugin.locate_then_edit.solve import Solver
from unierase_plugin.locate_then_edit.targets import context_texts
from unierase_plugin.locate_then_edit.value_loss import ValueTarget
from unierase_plugin.locate_then_edit.values import Values, optimise_values
from unierase_plugin.models import products
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.models.generate import continue_greedily, pad_token_id
from unierase_plugin.models.loading import load
from unierase_plugin.models.memory import fitting_tokens
from unierase_plugin.models.prompts import PLAIN_FORM
from unierase_plugin.models.trace import pad, run_blocks
from unierase_plugin.statistics.second_moment import second_moments

LAYERS = (4, 5, 6, 7, 8)
TARGET = " I don't know."
#: EasyEdit's shipped values for models of the Llama family, but for the learning rate: with hidden states of norm 130
#: its 0.1 reaches nothing in 20 steps, and 0.5 is what its MEMIT file for a small Llama has.
V_LR, CLAMP, KL, DECAY, STOP = 0.5, 0.75, 0.0625, 0.5, 0.05
LAMBDA, RHO, THRESHOLD = 15000.0, 10.0, 2e-2
CONTEXTS = ((10, 5),)
GENERATED = 16
PIECES = ("statistics", "values", "keys", "solve", "whole", "slope", "table")
EDITS = {"ridge": "MEMIT", "null_space": "AlphaEdit"}

Facts = list[dict[str, Any]]
#: By the clock, and of all processors.
Seconds = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is the same on both sides."""

    model: str
    out: Path
    steps: int
    corpus_tokens: int
    many: str
    threads: int = 2

    def load(self) -> tuple[Any, Any]:
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        model, tokenizer = load(self.model, "cpu", "float32")
        model.eval().requires_grad_(False)
        tokenizer.padding_side = "right"
        return model, tokenizer

    def contexts(self, model: Any, tokenizer: Any) -> tuple[str, ...]:
        return context_texts(model, tokenizer, CONTEXTS, pad_token_id(model, tokenizer))

    def texts(self, tokenizer: Any) -> list[str]:
        """Python's own manual, whole topics of up to 12,000 characters in order: the same on every machine."""
        from pydoc_data.topics import topics

        texts, count = [], 0
        for name in sorted(topics):
            if len(topics[name]) <= 12000 and count < self.corpus_tokens:
                texts.append(topics[name])
                count += len(tokenizer(topics[name])["input_ids"])
        return texts

    def facts(self, n: int) -> Facts:
        """n facts: those that the demo forgets come first."""
        second = json.loads(Path(__file__).with_name("second_facts.json").read_text(encoding="utf-8"))
        lists = (demo_facts(), second)
        every = [fact for part in ("forget", "retain") for facts in lists for fact in facts[part]]
        return every[:n]

    def many_facts(self) -> Facts:
        if not self.many:
            return []
        rows = [json.loads(line) for line in Path(self.many).read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["question"].count(row["subject"]) == 1]


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    """Every call into our engine."""

    def __init__(self, setup: Setup, model: Any, tokenizer: Any, contexts: Sequence[str], target: str = TARGET) -> None:
        self.setup, self.model, self.tokenizer = setup, model, tokenizer
        self.contexts = ("", *contexts)
        self.arch = find_architecture(model)
        self.pad_id = pad_token_id(model, tokenizer)
        self.max_tokens = fitting_tokens(model)
        self.target: list[int] = tokenizer.encode(target, add_special_tokens=False)
        length = len(self.target)
        values: dict[str, Any] = {
            "layers": LAYERS,
            "v_num_grad_steps": setup.steps - 1,
            "clamp_norm_factor": CLAMP,
            "kl_factor": KL * length,
            "v_weight_decay": DECAY * length,
            "v_stop_loss": STOP,
            "v_continuation_weight": float(length - 1),
            "mom2_update_weight": LAMBDA,
            "L2": RHO,
        }
        if "v_share_subject" in UniEraseHyperParams.__dataclass_fields__:
            values["v_share_subject"] = False
        self.hparams = UniEraseHyperParams(**values)

    def prompts(self, fact: dict[str, Any]) -> tuple[Prompt, ...]:
        text = PLAIN_FORM.format(question=fact["question"])
        return tuple(
            locate_in_text(self.tokenizer, f"{context} {text}" if context else text, fact["subject"])
            for context in self.contexts
        )

    def targets(self, facts: Facts) -> list[ValueTarget]:
        return [
            ValueTarget(
                self.prompts(fact),
                locate_in_text(self.tokenizer, f"{fact['subject']} is a", fact["subject"]),
                tuple(self.target[1:]),
            )
            for fact in facts
        ]

    def statistics(self, texts: Sequence[str]) -> dict[int, Tensor]:
        sequences = [self.tokenizer(text, truncation=True, max_length=8192)["input_ids"] for text in texts]
        return second_moments(self.arch, sequences, LAYERS, max_tokens=self.max_tokens, pad_id=self.pad_id).moments

    def with_rate(self, facts: Facts) -> UniEraseHyperParams:
        """EasyEdit's absolute learning rate in units of the states' root mean square."""
        stream = KeyStream(self.arch, [self.prompts(fact)[:1] for fact in facts], LAYERS, self.max_tokens, self.pad_id)
        states = stream.final_states()
        return self.hparams.replace(v_lr=V_LR / float(states.square().mean(0).sqrt().mean()))

    def values(self, facts: Facts) -> Values:
        return optimise_values(
            self.arch,
            self.targets(facts),
            self.target[0],
            self.with_rate(facts),
            max_tokens=self.max_tokens,
            pad_id=self.pad_id,
            progress=ticker("our values"),
        )

    def keys(self, facts: Facts) -> dict[int, tuple[Tensor, Tensor]]:
        """(K, H) by layer, the weights as they are."""
        stream = KeyStream(self.arch, [self.prompts(f) for f in facts], LAYERS, self.max_tokens, self.pad_id)
        return {layer: stream.advance(layer) for layer in LAYERS}

    def solver(self, kind: str, moment: Tensor, largest: float) -> Solver:
        """EasyEdit's threshold is absolute, ours a share of the largest eigenvalue."""
        settings = self.hparams.replace(solver=kind, nullspace_threshold=THRESHOLD / largest)
        return make_solver(settings, moment, None)

    def edit(self, facts: Facts, kind: str, moments: dict[int, Tensor], values: Values) -> None:
        solvers = {layer: self.solver(kind, moments[layer], largest(moments[layer])) for layer in LAYERS}
        prompts = [self.prompts(fact) for fact in facts]
        made = compute_edit(self.arch, prompts, values, solvers, max_tokens=self.max_tokens, pad_id=self.pad_id)
        apply_edit(self.arch, made)


def largest(moment: Tensor) -> float:
    """The largest eigenvalue."""
    return float(torch.linalg.eigvalsh(moment.double())[-1])


# --- EasyEdit's -------------------------------------------------------------------------------------------------------


class Theirs:
    """Every call into EasyEdit, and what is put in place around it."""

    def __init__(self, setup: Setup, kind: str, model: Any, tokenizer: Any, contexts: Sequence[str]) -> None:
        import_easyedit()
        from easyeditor.models.alphaedit import AlphaEdit_main
        from easyeditor.models.alphaedit.AlphaEdit_hparams import AlphaEditHyperParams
        from easyeditor.models.memit import memit_main
        from easyeditor.models.memit.memit_hparams import MEMITHyperParams
        from easyeditor.models.rome import layer_stats

        self.setup, self.kind, self.model, self.tokenizer = setup, kind, model, tokenizer
        self.layer_stats: ModuleType = layer_stats
        self.main: ModuleType = AlphaEdit_main if kind == "null_space" else memit_main
        made = AlphaEditHyperParams if kind == "null_space" else MEMITHyperParams
        extra = {"nullspace_threshold": THRESHOLD, "L2": RHO, "P_loc": "no file"} if kind == "null_space" else {}
        self.work = Path(tempfile.mkdtemp(prefix="easyedit-"))
        self.texts = setup.texts(tokenizer)
        self.hparams = made(
            layers=list(LAYERS),
            layer_selection="all",
            fact_token="subject_last",
            v_num_grad_steps=setup.steps,
            v_lr=V_LR,
            v_loss_layer=len(model.model.layers) - 1,
            v_weight_decay=DECAY,
            clamp_norm_factor=CLAMP,
            kl_factor=KL,
            mom2_adjustment=True,
            mom2_update_weight=LAMBDA,
            rewrite_module_tmp="model.layers.{}.mlp.down_proj",
            layer_module_tmp="model.layers.{}",
            mlp_module_tmp="model.layers.{}.mlp",
            attn_module_tmp="model.layers.{}.self_attn",
            # By a name of its own: a tied head has none among the parameters.
            ln_f_module="model.norm",
            lm_head_module=head_name(model),
            mom2_dataset="wikipedia",
            mom2_n_samples=len(self.texts),
            mom2_dtype="float32",
            alg_name=EDITS[kind],
            device="cpu",
            # It allocates by the family's name in this field.
            model_name="a llama",
            stats_dir=str(self.work / "stats"),
            **extra,
        )
        self.contexts = [["{}"], [f"{context.replace('{', ' ').replace('}', ' ')} {{}}" for context in contexts]]
        self.main.CONTEXT_TEMPLATES_CACHE = self.contexts
        self.log = io.StringIO()

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Its prints go to self.log; what it writes into the current folder goes to a scratch one."""
        self.log = io.StringIO()
        before = Path.cwd()
        os.chdir(self.work)
        try:
            with contextlib.redirect_stdout(self.log):
                yield
        finally:
            os.chdir(before)

    def close(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def requests(self, facts: Facts) -> list[dict[str, Any]]:
        return [
            {
                "case_id": index,
                "subject": fact["subject"],
                "target_new": TARGET,
                "prompt": PLAIN_FORM.format(question=fact["question"]).replace(fact["subject"], "{}"),
            }
            for index, fact in enumerate(facts)
        ]

    @contextlib.contextmanager
    def local_texts(self) -> Iterator[None]:
        from datasets import Dataset

        rows = Dataset.from_dict({"text": self.texts})
        with replaced(self.layer_stats, load_dataset=lambda *args, **kwargs: {"train": rows}):
            yield

    def statistics(self) -> dict[int, Tensor]:
        h = self.hparams
        with self.quiet(), self.local_texts():
            return {
                layer: self.main.get_cov(
                    self.model,
                    self.tokenizer,
                    h.rewrite_module_tmp.format(layer),
                    h.mom2_dataset,
                    h.mom2_n_samples,
                    h.mom2_dtype,
                    hparams=h,
                )
                for layer in LAYERS
            }

    def value(self, request: dict[str, Any]) -> tuple[Tensor, int, float]:
        """z, passes, and the probability of the target that it prints last (the mean over contexts)."""
        with self.quiet():
            z = self.main.compute_z(
                self.model, self.tokenizer, request, self.hparams, LAYERS[-1], self.main.CONTEXT_TEMPLATES_CACHE
            )
        seen = re.findall(r"avg prob of \[.*?\] (\S+)", self.log.getvalue())
        return z.detach(), len(seen), float(seen[-1])

    def keys(self, requests: list[dict[str, Any]], layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """What one pass of its loop over blocks computes before each solve."""
        h, out = self.hparams, {}
        templates, subjects = [r["prompt"] for r in requests], [r["subject"] for r in requests]
        more = {"track": "out"} if self.kind == "ridge" else {}
        with self.quiet():
            for layer in layers:
                keys = self.main.compute_ks(
                    self.model, self.tokenizer, requests, h, layer, self.main.CONTEXT_TEMPLATES_CACHE
                )
                states = self.main.get_module_input_output_at_words(
                    self.model,
                    self.tokenizer,
                    LAYERS[-1],
                    context_templates=templates,
                    words=subjects,
                    module_template=h.layer_module_tmp,
                    fact_token_strategy=h.fact_token,
                    **more,
                )
                out[layer] = keys.T, (states if more else states[1]).T
        return out

    def projections(self, moments: dict[int, Tensor]) -> Tensor:
        with self.quiet(), replaced(self.main, get_cov=self._served(moments)):
            return torch.stack(
                [self.main.get_project(self.model, self.tokenizer, layer, self.hparams) for layer in LAYERS]
            )

    def algebra(
        self, keys: dict[int, Tensor], states: Tensor, values: Tensor, moments: dict[int, Tensor], projections: Tensor
    ) -> dict[int, Tensor]:
        """Its execute function with all but the algebra served from memory: Delta (d, m) by layer."""
        requests = self.requests([{"question": "x of y", "subject": "y"}] * values.shape[1])
        by_request = iter(values.T)
        served: dict[str, Any] = {
            "compute_z": lambda *args: next(by_request),
            "compute_ks": lambda model, tok, requests, hparams, layer, contexts: keys[layer].T,
            "get_module_input_output_at_words": lambda *args, **kwargs: (
                states.T if self.kind == "ridge" else (None, states.T)
            ),
            "get_cov": self._served(moments),
        }
        if self.kind == "null_space":
            served |= {"P": projections, "cache_c": torch.zeros_like(projections), "cache_c_new": True}
            run = self.main.execute_AlphaEdit
        else:
            run = self.main.execute_memit
        with self.quiet(), replaced(self.main, **served):
            deltas = run(self.model, self.tokenizer, requests, self.hparams)
        names = {self.hparams.rewrite_module_tmp.format(layer) + ".weight": layer for layer in LAYERS}
        if self.kind == "ridge":
            return {names[name]: residual @ keys.T for name, (keys, residual) in deltas.items()}
        return {names[name]: delta for name, delta in deltas.items()}

    def apply(self, facts: Facts, z_folder: Path) -> None:
        """The whole of it, statistics included; values that lie in z_folder are not computed again."""
        run = self.main.apply_AlphaEdit_to_model if self.kind == "null_space" else self.main.apply_memit_to_model
        with self.quiet(), self.local_texts():
            run(self.model, self.tokenizer, self.requests(facts), self.hparams, cache_template=z_template(z_folder))

    def _served(self, moments: dict[int, Tensor]) -> Callable[..., Tensor]:
        by_name = {self.hparams.rewrite_module_tmp.format(layer): moments[layer].float() for layer in LAYERS}
        return lambda model, tok, name, *args, **kwargs: by_name[name]


def head_name(model: Any) -> str:
    return "lm_head" if "lm_head.weight" in dict(model.named_parameters()) else "model.embed_tokens"


@contextlib.contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    missing = object()
    before = {name: getattr(module, name, missing) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            delattr(module, name) if value is missing else setattr(module, name, value)


def z_template(folder: Path) -> str:
    """The names under which EasyEdit looks for values computed before: block, clamp, request."""
    return str(folder / "z_{}_{}_{}.npz")


# --- pieces -----------------------------------------------------------------------------------------------------------


def ticker(name: str) -> Callable[[float], None]:
    """Prints every tenth of the way."""
    told = [-1]

    def tell(share: float) -> None:
        if int(10 * share) > told[0]:
            told[0] = int(10 * share)
            print(f"  {name}: {100 * share:.0f} %", flush=True)

    return tell


def timed(name: str, call: Callable[[], Any], repeats: int = 1) -> tuple[Any, Seconds]:
    """(result, median seconds)."""
    clock, processor = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        result = call()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    seconds = {"clock": statistics.median(clock), "cpu": statistics.median(processor)}
    print(f"  {name}: {seconds['clock']:.4g} s by the clock, {seconds['cpu']:.4g} s of processors", flush=True)
    return result, seconds


def scaled(seconds: Seconds, factor: float) -> Seconds:
    return {name: value * factor for name, value in seconds.items()}


def summed(parts: Iterable[Seconds]) -> Seconds:
    total = {"clock": 0.0, "cpu": 0.0}
    for part in parts:
        total = {name: value + part[name] for name, value in total.items()}
    return total


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


def run_statistics(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = setup.load()
    texts = setup.texts(tokenizer)
    ours, theirs = Ours(setup, model, tokenizer, ()), Theirs(setup, "ridge", model, tokenizer, ())
    got, our_seconds = timed("our statistics", lambda: ours.statistics(texts))
    wanted, their_seconds = timed("EasyEdit's statistics", theirs.statistics)
    theirs.close()
    torch.save(got, setup.out / "moments.pt")
    return {
        "tokens": sum(len(tokenizer(text)["input_ids"]) for text in texts),
        "texts": len(texts),
        "ours": our_seconds,
        "theirs": their_seconds,
        "difference": max(relative(got[layer], wanted[layer]) for layer in LAYERS),
    }


def run_values(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Goes on where an earlier run stopped: EasyEdit's values are kept as it keeps them, with the seconds each took."""
    import numpy

    model, tokenizer = setup.load()
    contexts = setup.contexts(model, tokenizer)
    ours, theirs = Ours(setup, model, tokenizer, contexts), Theirs(setup, "null_space", model, tokenizer, contexts)
    folder = z_folder(setup)
    folder.mkdir(exist_ok=True)
    result: dict[str, Any] = read(setup, "values") or {"ours": {}, "theirs": {}}
    facts = setup.facts(options.requests[0])
    check_positions(ours, theirs, facts)
    wanted = {}
    for index, request in enumerate(theirs.requests(facts)[: options.their_values]):
        path, note = Path(z_template(folder).format(LAYERS[-1], CLAMP, index)), folder / f"{index}.json"
        if not note.is_file():
            (z, passes, probability), seconds = timed(f"EasyEdit's value {index}", lambda r=request: theirs.value(r))
            numpy.savez(path, v_star=z.numpy())
            note.write_text(json.dumps({**seconds, "passes": passes, "probability": probability}))
        result["theirs"][str(index)] = json.loads(note.read_text())
        keep(setup, "values", result)
        wanted[index] = torch.from_numpy(numpy.load(path)["v_star"])
    theirs.close()
    for n in options.requests:
        if str(n) in result["ours"]:
            continue
        values, seconds = timed(f"our values of {n}", lambda n=n: ours.values(setup.facts(n)))
        result["ours"][str(n)] = {
            **seconds,
            "steps": float(values.steps.float().mean()),
            "probability": float((-values.nll).exp().mean()),
        }
        if n == options.requests[0]:
            torch.save(values.states, setup.out / "values.pt")
            gaps = [relative(values.states[i], z) for i, z in wanted.items()]
            result["difference"] = statistics.mean(gaps) if gaps else None
        keep(setup, "values", result)
    return result


def z_folder(setup: Setup) -> Path:
    return setup.out / f"their-values-{setup.steps}"


def check_positions(ours: Ours, theirs: Theirs, facts: Facts) -> None:
    """Both sides edit at the same token of the same tokens."""
    from easyeditor.models.rome.repr_tools import get_words_idxs_in_templates

    templates = [context for contexts in theirs.contexts for context in contexts]
    for fact, request in zip(facts, theirs.requests(facts), strict=True):
        for prompt, template in zip(ours.prompts(fact), templates, strict=True):
            text = template.format(request["prompt"])
            at = get_words_idxs_in_templates(ours.tokenizer, [text], [fact["subject"]], "last")[0][0]
            ids = ours.tokenizer(text.format(fact["subject"]))["input_ids"]
            if (at, tuple(ids)) != (prompt.position, prompt.ids):
                raise SystemExit(f"the two sides do not edit the same token of {text!r}: {at}, {prompt.position}")


def run_keys(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """EasyEdit's for more than the first number of requests: one block of the five, since all take the same passes."""
    model, tokenizer = setup.load()
    contexts = setup.contexts(model, tokenizer)
    ours = Ours(setup, model, tokenizer, contexts)
    result: dict[str, Any] = {}
    for kind in EDITS:
        theirs = Theirs(setup, kind, model, tokenizer, contexts)
        for n in options.requests:
            facts, whole = setup.facts(n), n == options.requests[0]
            layers = LAYERS if whole else LAYERS[:1]
            wanted, seconds = timed(
                f"{EDITS[kind]}'s keys of {n}", lambda f=facts, b=layers, t=theirs: t.keys(t.requests(f), b)
            )
            result.setdefault(str(n), {})[kind] = scaled(seconds, len(LAYERS) / len(layers))
            if whole and kind == "ridge":
                torch.save(
                    {"keys": {k: v[0] for k, v in wanted.items()}, "states": wanted[LAYERS[-1]][1]},
                    setup.out / "keys.pt",
                )
                # With all templates in one list its mean is ours.
                with replaced(theirs.main, CONTEXT_TEMPLATES_CACHE=[list(chain(*theirs.contexts))]):
                    flat = theirs.keys(theirs.requests(facts), LAYERS[-1:])[LAYERS[-1]]
        theirs.close()
    for n in options.requests:
        got, seconds = timed(f"our keys of {n}", lambda n=n: ours.keys(setup.facts(n)), 3)
        result[str(n)]["ours"] = seconds
        if n == options.requests[0]:
            result["difference"] = relative(got[LAYERS[-1]][0], flat[0])
    return result


def corpus_keys(setup: Setup, model: Any, tokenizer: Any, n: int) -> tuple[dict[int, Tensor], Tensor]:
    """K (m, n) by layer and H (d, n) at n tokens of the corpus, drawn by a seed."""
    ids = [token for text in setup.texts(tokenizer)[:8] for token in tokenizer(text)["input_ids"]][:2048]
    arch = find_architecture(model)
    with torch.no_grad():
        trace = run_blocks(arch, pad([ids], 0, "right", arch.device), last=LAYERS[-1], inputs_of=LAYERS)
    chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:n]
    return {layer: trace.projection_inputs[layer][0, chosen].T for layer in LAYERS}, trace.hidden[0, chosen].T


def run_solve(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Given K, Z, C: first the requests' own, then as many keys of corpus tokens as asked for."""
    model, tokenizer = setup.load()
    moments: dict[int, Tensor] = torch.load(setup.out / "moments.pt")
    tops = {layer: largest(moments[layer]) for layer in LAYERS}
    ours = Ours(setup, model, tokenizer, ())
    result: dict[str, Any] = {"factorise": {}, "condition": {}, "solve": {}, "same": {}}
    noise = torch.Generator().manual_seed(1)
    for kind in EDITS:
        theirs = Theirs(setup, kind, model, tokenizer, ())
        projections = torch.zeros(0)
        if kind == "null_space":
            projections, seconds = timed("AlphaEdit's projections", lambda t=theirs: t.projections(moments), 2)
            result["projection"] = {"theirs": seconds, "free": [int(p.diagonal().sum().round()) for p in projections]}
        solvers, seconds = timed(f"our factorisation, {kind}", lambda k=kind: factorised(ours, k, moments, tops), 3)
        result["factorise"][kind] = seconds
        result["condition"][kind] = [solvers[layer].condition() for layer in LAYERS]
        saved, own = torch.load(setup.out / "keys.pt"), torch.load(setup.out / "values.pt").T
        wanted = theirs.algebra(saved["keys"], saved["states"], own, moments, projections)
        got = dense(solvers, saved["keys"], own - saved["states"])
        result["same"][kind] = max(relative(got[layer], wanted[layer]) for layer in LAYERS)
        for n in options.solve_requests:
            keys, states = corpus_keys(setup, model, tokenizer, n)
            values = states + 0.5 * states.norm(dim=0) * torch.randn(states.shape, generator=noise) / 24
            wanted, their_seconds = timed(
                f"{EDITS[kind]}'s algebra, n = {n}",
                lambda t=theirs, k=keys, s=states, v=values, p=projections: t.algebra(k, s, v, moments, p),
                5,
            )
            got, our_seconds = timed(f"ours, n = {n}", lambda s=solvers, k=keys, r=values - states: dense(s, k, r), 9)
            truth = exact(ours, kind, keys, values - states, moments)
            result["solve"].setdefault(kind, {})[n] = {
                "ours": our_seconds,
                "theirs": their_seconds,
                "our_error": max(relative(got[layer], truth[layer]) for layer in LAYERS),
                "their_error": max(relative(wanted[layer], truth[layer]) for layer in LAYERS),
            }
        theirs.close()
    return result


def factorised(ours: Ours, kind: str, moments: dict[int, Tensor], tops: dict[int, float]) -> dict[int, Solver]:
    return {layer: ours.solver(kind, moments[layer], tops[layer]) for layer in LAYERS}


def dense(solvers: dict[int, Solver], keys: dict[int, Tensor], residual: Tensor) -> dict[int, Tensor]:
    """Delta (d, m) by layer, the residual spread as both sides spread it."""
    out = {}
    for index, layer in enumerate(LAYERS):
        update = solvers[layer].solve(keys[layer], residual / (len(LAYERS) - index))
        out[layer] = update.up.float() @ update.down.float()
    return out


def exact(
    ours: Ours, kind: str, keys: dict[int, Tensor], residual: Tensor, moments: dict[int, Tensor]
) -> dict[int, Tensor]:
    """The primal in float64."""
    out = {}
    for index, layer in enumerate(LAYERS):
        share, moment = residual.double() / (len(LAYERS) - index), moments[layer].double()
        if kind == "ridge":
            out[layer] = reference.ridge(keys[layer], share, LAMBDA * moment)
        else:
            out[layer] = reference.null_space(keys[layer], share, moment, THRESHOLD / largest(moment), RHO)
    return out


def run_whole(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    result = read(setup, "whole")
    for name in options.whole or [f"{side}-{kind}" for kind in EDITS for side in ("ours", "theirs")]:
        print(f"  {name}", flush=True)
        subprocess.run([sys.executable, __file__, *options.passed, "--one", name], check=True)
        result[name] = read(setup, f"one-{name}")
        keep(setup, "whole", result)
    return result


def run_one(setup: Setup, options: argparse.Namespace) -> None:
    """One whole edit, statistics included, in this process; then how well the edited model does."""
    side, kind = options.one.split("-")
    n = options.requests[0]
    facts = setup.facts(n)
    model, tokenizer = setup.load()
    contexts = setup.contexts(model, tokenizer)
    before = quality(setup, model, tokenizer, facts)["retain"]
    phases: dict[str, Seconds] = {}
    engine: Any = (Ours if side == "ours" else Theirs)(  # type: ignore[call-arg]
        setup, *(() if side == "ours" else (kind,)), model, tokenizer, contexts
    )
    forget_peak()
    floor = peak_bytes()
    if side == "ours":
        moments, phases["statistics"] = timed("statistics", lambda: engine.statistics(setup.texts(tokenizer)))
        values, phases["values"] = timed("values", lambda: engine.values(facts))
        _, phases["keys and solve"] = timed("keys and solve", lambda: engine.edit(facts, kind, moments, values))
    else:
        folder, phases["values, computed before"] = earlier_values(setup, engine.work, n)
        _, phases["the rest"] = timed("the rest", lambda: engine.apply(facts, folder))
    result = {"n": n, **summed(phases.values()), "phases": phases, "peak_bytes": peak_bytes(), "before_bytes": floor}
    result["quality"] = {**quality(setup, model, tokenizer, facts), "retain_before": before}
    if side == "theirs":
        engine.close()
    keep(setup, f"one-{options.one}", result)


def earlier_values(setup: Setup, work: Path, n: int) -> tuple[Path, Seconds]:
    """A folder with EasyEdit's values of an earlier piece, the first left out so that this process computes one."""
    folder, seconds = work / "values", []
    folder.mkdir()
    for index in range(1, n):
        source = Path(z_template(z_folder(setup)).format(LAYERS[-1], CLAMP, index))
        if source.is_file():
            shutil.copy(source, folder)
            seconds.append(json.loads((z_folder(setup) / f"{index}.json").read_text()))
    return folder, summed(seconds)


def peak_bytes() -> int:
    """The process' largest resident size since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


def forget_peak() -> None:
    """Linux alone can: what was freed goes back to the system, and the largest size is that of now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@torch.no_grad()
def quality(setup: Setup, model: Any, tokenizer: Any, facts: Facts) -> dict[str, Any]:
    """Of the requests p(target), the geometric mean over its tokens, and what is generated; of other facts, answers."""
    target = tokenizer.encode(TARGET, add_special_tokens=False)
    chances = []
    for fact in facts:
        prompt = tokenizer(PLAIN_FORM.format(question=fact["question"]))["input_ids"]
        logs = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chances.append(float(logs[range(len(target)), target].mean().exp()))

    def said(asked: Facts) -> list[str]:
        prompts = [tokenizer(PLAIN_FORM.format(question=fact["question"]))["input_ids"] for fact in asked]
        return [
            tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0]
            for ids in continue_greedily(model, tokenizer, prompts, GENERATED)
        ]

    others = [fact for fact in setup.facts(120) if fact not in facts]
    texts, kept = said(facts), said(others)
    return {
        "p_target": statistics.mean(chances),
        "n": len(facts),
        "declined": sum(TARGET.strip() in text for text in texts),
        "still_answered": sum(answered(f["answer"], t, f["question"]) for f, t in zip(facts, texts, strict=True)),
        "retain": {
            "n": len(others),
            "declined": sum(TARGET.strip() in text for text in kept),
            "answered": sum(answered(f["answer"], t, f["question"]) for f, t in zip(others, kept, strict=True)),
        },
    }


def run_slope(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Ours alone, as requests grow: values at few steps (their cost is linear in steps), keys, solves."""
    facts = setup.many_facts()
    if not facts:
        print("  left out: give --many, a file of JSON lines with question and subject")
        return {}
    model, tokenizer = setup.load()
    few = dataclasses.replace(setup, steps=options.slope_steps)
    ours = Ours(few, model, tokenizer, setup.contexts(model, tokenizer))
    moments = torch.load(setup.out / "moments.pt")
    solvers = {layer: ours.solver("ridge", moments[layer], 1.0) for layer in LAYERS}
    result: dict[str, Any] = {"passes": options.slope_steps, "n": {}}
    for n in options.slope:
        values, value_seconds = timed(f"values of {n}", lambda n=n: ours.values(facts[:n]))
        keys, key_seconds = timed(f"keys of {n}", lambda n=n: ours.keys(facts[:n]))
        own = {layer: pair[0] for layer, pair in keys.items()}
        residual = values.states.T - keys[LAYERS[-1]][1]
        _, solve_seconds = timed(f"solve for {n}", lambda k=own, r=residual: dense(solvers, k, r), 5)
        result["n"][n] = {"values": value_seconds, "keys": key_seconds, "solve": solve_seconds}
    return result


# --- the table --------------------------------------------------------------------------------------------------------


def keep(setup: Setup, piece: str, result: dict[str, Any]) -> None:
    (setup.out / f"{piece}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def read(setup: Setup, piece: str) -> dict[str, Any]:
    path = setup.out / f"{piece}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def ratio_row(what: str, theirs: Seconds, ours: Seconds, target: str, note: str = "") -> str:
    ratios = [f"{theirs[name] / ours[name]:.1f}" for name in ("clock", "cpu")]
    cells = [what, shown(theirs["clock"]), shown(ours["clock"]), *ratios, target, note]
    return "| " + " | ".join(cells) + " |"


def shown(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def run_table(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    columns = ("what", "EasyEdit", "ours", "times faster", "by processor seconds", "target", "")
    rows = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows += value_rows(read(setup, "values")) + phase_rows(read(setup, "statistics"), read(setup, "keys"))
    rows += solve_rows(read(setup, "solve")) + whole_rows(read(setup, "whole")) + slope_rows(read(setup, "slope"))
    text = "\n".join(rows)
    print(text)
    (setup.out / "table.md").write_text(text + "\n", encoding="utf-8")
    return {}


def value_rows(got: dict[str, Any]) -> list[str]:
    if not got:
        return []
    each = list(got["theirs"].values())
    passes = statistics.mean(one["passes"] for one in each)
    rows = []
    for n, ours in got["ours"].items():
        # The same requests for both where EasyEdit's are known, else as many times its mean.
        theirs = scaled(summed(each[: int(n)]), int(n) / min(int(n), len(each)))
        note = f"passes a request {passes:.1f} and {ours['steps'] + 1:.1f}; "
        note += "all measured" if len(each) >= int(n) else f"EasyEdit's extrapolated from {len(each)} requests"
        rows.append(ratio_row(f"values, {n} requests", theirs, ours, "8", note))
    return rows


def phase_rows(moments: dict[str, Any], keys: dict[str, Any]) -> list[str]:
    rows = []
    if moments:
        note = f"{moments['tokens']} tokens; C differs by {moments['difference']:.1e}"
        rows.append(ratio_row("statistics, 5 blocks", moments["theirs"], moments["ours"], "8", note))
    for index, (n, one) in enumerate((key, value) for key, value in keys.items() if key != "difference"):
        for kind, name in EDITS.items():
            note = f"K differs by {keys['difference']:.1e}" if index == 0 else "EasyEdit's: one block times five"
            rows.append(ratio_row(f"keys, 5 blocks, {n} requests ({name})", one[kind], one["ours"], "6", note))
    return rows


def solve_rows(got: dict[str, Any]) -> list[str]:
    if not got:
        return []
    free = ", ".join(map(str, got["projection"]["free"]))
    rows = [
        ratio_row(
            "projection, 5 blocks (AlphaEdit)",
            got["projection"]["theirs"],
            got["factorise"]["null_space"],
            "2",
            f"free directions {free}",
        )
    ]
    for kind, name in EDITS.items():
        for (n, one), target in zip(got["solve"][kind].items(), ("50", "10", "3"), strict=False):
            note = f"error {one['their_error']:.1e} and {one['our_error']:.1e}"
            rows.append(ratio_row(f"solve, 5 blocks, n = {n} ({name})", one["theirs"], one["ours"], target, note))
        condition = max(got["condition"][kind])
        rows.append(
            f"| edit given the same K, Z, C ({name}) | | | | | 1e-4 | differs by {got['same'][kind]:.1e}; condition at "
            f"most {condition:.1e} |"
        )
    rows.append(f"| our Cholesky factors, once | - | {shown(got['factorise']['ridge']['clock'])} | | | | |")
    return rows


def whole_rows(got: dict[str, Any]) -> list[str]:
    rows = []
    for kind, name in EDITS.items():
        pair = [got.get(f"{side}-{kind}") for side in ("theirs", "ours")]
        if not all(pair):
            continue
        theirs, ours = pair
        rows.append(ratio_row(f"whole edit, {ours['n']} requests ({name})", theirs, ours, "7"))  # type: ignore[arg-type, index]
        peaks, floors = ([one[key] / 2**30 for one in pair] for key in ("peak_bytes", "before_bytes"))  # type: ignore[index]
        rows.append(
            f"| its peak memory | {peaks[0]:.2f} GiB | {peaks[1]:.2f} GiB | {peaks[0] / peaks[1]:.1f} less | | 2 "
            f"| before the edit {floors[0]:.2f} and {floors[1]:.2f} |"
        )
        rows += [quality_row(side, one["quality"]) for side, one in (("EasyEdit", theirs), ("ours", ours))]  # type: ignore[index]
    return rows


def slope_rows(got: dict[str, Any]) -> list[str]:
    rows = []
    for n, one in got.get("n", {}).items():
        total = summed(one.values())
        rows.append(
            f"| {n} requests, {got['passes']} passes | - | {shown(total['clock'])} | | | linear "
            f"| {1000 * total['clock'] / int(n):.0f} ms a request, {1000 * total['cpu'] / int(n):.0f} of processors |"
        )
    return rows


def quality_row(side: str, one: dict[str, Any]) -> str:
    retain, before = one["retain"], one["retain_before"]
    return (
        f"| quality, {side} | | | | | no worse | p(target) {one['p_target']:.3f}; declined {one['declined']} and "
        f"answered {one['still_answered']} of {one['n']}; of {retain['n']} others answered {before['answered']} → "
        f"{retain['answered']}, declined {before['declined']} → {retain['declined']} |"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--model", required=True, help="folder of a Llama-shaped model of at least 9 blocks")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="few requests, steps and tokens: does it all run?")
    parser.add_argument("--their-values", type=int, default=4, help="requests on which EasyEdit's values are measured")
    tofu = os.environ.get("UNIERASE_TOFU_DIR")
    many = str(Path(tofu) / "forget10_subject.json") if tofu else ""
    parser.add_argument("--many", default=many, help="JSON lines with question and subject, for `slope`")
    parser.add_argument("--threads", type=int, default=2, help="of either side; one where the machine is shared")
    parser.add_argument("--plain-products", action="store_true", help="ours too through torch's default library")
    parser.add_argument("--whole", nargs="*", help="edits of `whole`, such as ours-ridge theirs-null_space; all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.pieces) - set(PIECES)
    if unknown:
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are: {', '.join(PIECES)}")
    quick = options.quick
    options.requests = [4, 8] if quick else [20, 100]
    options.solve_requests = [20] if quick else [20, 100, 400]
    options.slope, options.slope_steps = ([4, 8], 2) if quick else ([20, 100, 400], 3)
    options.their_values = min(options.their_values, 2) if quick else options.their_values
    options.passed = [word for word in sys.argv[1:] if word not in PIECES]
    return options


def main() -> None:
    options = arguments()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    steps, tokens = (3, 2000) if options.quick else (20, 28000)
    setup = Setup(options.model, options.out, steps, tokens, options.many, options.threads)
    if options.plain_products:
        products._is_exact = lambda: False  # type: ignore[assignment]
    if options.one:
        run_one(setup, options)
        return
    for piece in options.pieces or PIECES:
        print(piece, flush=True)
        result = globals()[f"run_{piece}"](setup, options)
        if result:
            keep(setup, piece, result)


if __name__ == "__main__":
    main()
