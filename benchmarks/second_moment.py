#!/usr/bin/env python3
"""What the statistics pass costs: against the bare forward pass, against whole products, in float64, and shared by two.

    python benchmarks/second_moment.py --model FOLDER [--tokens 28000] [--layers 3-7] [--rounds 3]

Every figure of one line is from the same process, and the sides take turns. `processes` starts new ones of one thread
each, and counts the pass alone, not the start of Python and the loading of the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def prepare(options: argparse.Namespace) -> tuple[Any, list[list[int]], tuple[int, ...]]:
    """The model's parts, texts of 60 to 128 tokens of the bundled prose, and the blocks."""
    from unierase_plugin.facts.resources import paragraphs
    from unierase_plugin.models.architecture import find_architecture
    from unierase_plugin.models.loading import load

    model, tokenizer = load(options.model)
    model.requires_grad_(False)
    ids = tokenizer("\n".join(paragraphs("ordinary_text_train")))["input_ids"]
    source = random.Random(0)
    texts: list[list[int]] = []
    while sum(map(len, texts)) < options.tokens:
        size = source.randint(60, 128)
        start = source.randrange(len(ids) - size)
        texts.append(ids[start : start + size])
    first, last = map(int, options.layers.split("-"))
    return find_architecture(model), texts, tuple(range(first, last + 1))


def compare(options: argparse.Namespace) -> None:
    import torch

    from unierase_plugin.models.trace import pad, run_blocks, token_batches
    from unierase_plugin.statistics.second_moment import second_moments

    arch, texts, layers = prepare(options)
    found: dict[str, dict[int, torch.Tensor]] = {}

    @torch.no_grad()
    def forward(max_tokens: int = 1024) -> None:
        for rows in token_batches(texts, max_tokens):
            run_blocks(arch, pad([texts[row] for row in rows], 0, "right", arch.device), last=layers[-1])

    @torch.no_grad()
    def whole() -> None:
        """Whole products, summed in float32: as is usual, but in one pass."""
        sums: dict[int, Any] = {}
        for rows in token_batches(texts, 2048):
            batch = pad([texts[row] for row in rows], 0, "right", arch.device)
            trace = run_blocks(arch, batch, last=layers[-1], inputs_of=layers)
            for layer in layers:
                keys = trace.projection_inputs[layer][batch.mask.bool()]
                product = keys.T @ keys
                sums[layer] = sums[layer].add_(product) if layer in sums else product
        found["whole"] = {layer: total / sum(map(len, texts)) for layer, total in sums.items()}

    def ours(name: str, dtype: torch.dtype) -> Callable[[], None]:
        return lambda: found.update({name: second_moments(arch, texts, layers, dtype=dtype).moments})

    sides = {
        "forward, 1024 tokens a batch": forward,
        "forward, 2048": lambda: forward(2048),
        "whole products, float32 sums": whole,
        "mom2_dtype float32": ours("float32", torch.float32),
        "mom2_dtype float64": ours("float64", torch.float64),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _, (name, side) in itertools.product(range(options.rounds), sides.items()):
        start = time.perf_counter()
        side()
        best[name] = min(best[name], spent := time.perf_counter() - start)
        print(f"  {name}: {spent:.2f} s", file=sys.stderr, flush=True)
    print(
        f"{sum(map(len, texts))} tokens, blocks {layers}, {torch.get_num_threads()} threads, best of {options.rounds}"
    )
    for name, seconds in best.items():
        print(f"{name:32} {seconds:7.2f} s  {seconds / best['forward, 1024 tokens a batch']:5.2f}")
    for name in ("whole", "float32"):
        errors = [
            float((found[name][layer] - exact).norm() / exact.norm()) for layer, exact in found["float64"].items()
        ]
        print(f"{name}: relative error against float64, largest of the blocks {max(errors):.1e}")


def one_of(options: argparse.Namespace) -> None:
    """One process of several: its share, and the sum over all."""
    from unierase_plugin.statistics.distributed import joined_processes
    from unierase_plugin.statistics.second_moment import add_sequences, begin_sums

    arch, texts, layers = prepare(options)
    with joined_processes() as processes:
        processes.total(0)
        start = time.perf_counter()
        sums = begin_sums(arch, layers)
        add_sequences(arch, texts, sums, share=(processes.rank, processes.size))
        processes.add_up(sums.sums.values())
        if processes.leads:
            print(
                json.dumps(
                    {
                        "seconds": time.perf_counter() - start,
                        "traces": [float(total.trace()) for total in sums.sums.values()],
                    }
                )
            )


def processes(options: argparse.Namespace) -> None:
    best: dict[Any, Any] = {}
    traces: dict[Any, Any] = {}
    for _, size in itertools.product(range(options.rounds), (1, 2)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        base = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--one-of"]
        started = [
            subprocess.Popen(
                command, env={**base, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            for rank in range(size)
        ]
        outputs = [process.communicate()[0] for process in started]
        said = json.loads(outputs[0])
        best[size], traces[size] = min(best.get(size, float("inf")), said["seconds"]), said["traces"]
    apart = max(abs(a - b) / a for a, b in zip(traces[1], traces[2], strict=True))
    ratio = best[1] / best[2]
    print(f"1 process {best[1]:.2f} s, 2 processes {best[2]:.2f} s: {ratio:.2f} times as fast; {apart:.1e} apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=28000)
    parser.add_argument("--layers", default="3-7")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one-of", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_of:
        one_of(options)
    else:
        compare(options)
        processes(options)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
