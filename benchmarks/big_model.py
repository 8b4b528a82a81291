#!/usr/bin/env python3
"""All phases on a model of a published shape with random weights: nothing is downloaded but a small tokenizer.

    UNIERASE_TOFU_DIR=... python benchmarks/big_model.py --shape llama3.1-8b --device cuda --dtype bfloat16 \\
        --peak-tflops 989 --bandwidth 3350 --requests 400
    python benchmarks/big_model.py --shape tiny --device cpu --dtype float32 --requests 8

For every phase: seconds, the largest memory in use, the operations of its matrix products and the bytes that those read
and write, and the floor that the device's peak and bandwidth set: whichever of the two takes longer. The share is floor
over seconds. Random weights forget nothing and learn nothing; what is measured is cost alone, at the steps that the
shipped file for the shape asks for. Peak and bandwidth are the device's data sheet's, for the dtype that is used.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from unierase_plugin import UniEraseHyperParams
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.models.base_model import fetch_base_model
from unierase_plugin.models.loading import DTYPES
from unierase_plugin.models.memory import peak_memory_bytes
from unierase_plugin.pipeline import change
from unierase_plugin.storage.cache import cache_folder
from unierase_plugin.storage.phases import Phases

#: Published shapes, by the shipped file that holds their settings.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
    "llama3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50000,
        "tie_word_embeddings": True,
    },
}


#: What belongs to no phase.
BETWEEN = "between"


@dataclass
class Cost:
    seconds: float = 0.0
    operations: int = 0
    bytes: int = 0
    peak: int = 0


@dataclass
class Counter(TorchDispatchMode):
    """Operations of matrix products and attention, and the bytes that they read and write, by phase."""

    phase: str = BETWEEN
    costs: dict[str, Cost] = field(default_factory=dict)
    since: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            cost = self.costs.setdefault(self.phase, Cost())
            cost.operations += count(*_as_many_heads(args), **(kwargs or {}), out_val=out)
            whole = out if isinstance(out, tuple) else (out,)
            cost.bytes += sum(each.nbytes for each in (*args, *whole) if isinstance(each, torch.Tensor))
        return out

    def enter(self, phase: str) -> None:
        """Whatever comes belongs to this phase; what came since the last change belonged to the one before."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        cost, now = self.costs.setdefault(self.phase, Cost()), time.perf_counter()
        cost.seconds += now - self.since
        cost.peak = max(cost.peak, peak_memory_bytes())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.phase, self.since = phase, now


def _as_many_heads(args: Sequence[Any]) -> list[Any]:
    """Keys and values of grouped heads, (B, G, S, d), as the H heads that share them: what the count expects."""
    heads = max((each.shape[1] for each in args if isinstance(each, torch.Tensor) and each.dim() == 4), default=0)
    return [
        each.new_empty(each.shape[0], heads, *each.shape[2:], device="meta")
        if isinstance(each, torch.Tensor) and each.dim() == 4 and each.shape[1] not in (1, heads)
        else each
        for each in args
    ]


@contextmanager
def attributed(counter: Counter) -> Iterator[None]:
    """Every phase that a run times is one of the counter's."""
    timed = Phases.timed

    @contextmanager
    def counted(run: Phases, phase: str) -> Iterator[None]:
        outer = counter.phase
        counter.enter(phase)
        try:
            with timed(run, phase):
                yield
        finally:
            counter.enter(outer)

    Phases.timed = counted  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Phases.timed = timed  # type: ignore[method-assign]


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or fetch_base_model(cache_folder()).path)
    config = LlamaConfig(
        **SHAPES[options.shape],
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with on(options.device, DTYPES[options.dtype]):
        return LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer


@contextmanager
def on(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def settings(options: argparse.Namespace, scratch: Path) -> UniEraseHyperParams:
    """The shipped file's, with text sampled from the model as corpus, and nothing from the user's cache."""
    known = options.shape != "tiny"
    chosen = UniEraseHyperParams.from_hparams(options.shape) if known else UniEraseHyperParams()
    return chosen.replace(
        mom2_dataset="self",
        mom2_n_samples=options.samples,
        stats_dir=str(scratch),
        prompt_forms=("plain",),
        # A random model reaches no goal; the steps are those of the file, and none is left out.
        v_stop_loss=0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3.1-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--tokenizer", default="", help="a folder; without it, that of the demo's model")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--samples", type=int, default=512, help="texts of the corpus")
    parser.add_argument("--peak-tflops", type=float, help="of dense products in this dtype")
    parser.add_argument("--bandwidth", type=float, help="of the memory, GB/s")
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    scratch = options.out / "big_model_cache"
    options.out.mkdir(parents=True, exist_ok=True)
    counter = Counter()
    model, tokenizer = build(options)
    requests = read_requests(f"tofu:forget10[:{options.requests}]")
    try:
        with counter, attributed(counter):
            change(model, requests, tokenizer=tokenizer, hparams=settings(options, scratch))
    finally:  # what an interrupt leaves is worth a look
        tell(counter, options)


def tell(counter: Counter, options: argparse.Namespace) -> None:
    counter.enter(BETWEEN)
    rows = {phase: vars(cost) for phase, cost in counter.costs.items() if phase != BETWEEN}
    print("| phase | seconds | memory, GiB | tera-operations | gigabytes | floor, s | share |")
    print("|---|---|---|---|---|---|---|")
    for phase, row in rows.items():
        print(shown(phase, row, options))
    kind = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    text = json.dumps({"shape": options.shape, "device": kind, "dtype": options.dtype, "phases": rows}, indent=1)
    (options.out / f"big_model-{options.shape}.json").write_text(text + "\n", encoding="utf-8")


def shown(phase: str, row: dict[str, Any], options: argparse.Namespace) -> str:
    floor = 0.0
    if options.peak_tflops and options.bandwidth:
        floor = max(row["operations"] / options.peak_tflops / 1e12, row["bytes"] / options.bandwidth / 1e9)
    share = f"{100 * floor / row['seconds']:.0f} %" if floor else "-"
    cells = [
        phase,
        f"{row['seconds']:.1f}",
        f"{row['peak'] / 2**30:.1f}",
        f"{row['operations'] / 1e12:.3g}",
        f"{row['bytes'] / 1e9:.3g}",
        f"{floor:.2g}" if floor else "-",
        share,
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
