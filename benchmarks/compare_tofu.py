#!/usr/bin/env python3
"""The figures of docs/explanation/benchmarks.md that compare methods: tofu200, 40 facts to forget and 160 to keep.

    python benchmarks/compare_tofu.py --shared ../shared --out results/compare
    python benchmarks/compare_tofu.py --shared ../shared --out results/compare --only tuned --budget 4
    python benchmarks/compare_tofu.py --shared ../shared --out results/quick --forget 8 --keep 16 --only published

Parts: `published` (all methods, published settings), `tuned` (the same with a budget of tries), `ablation` (what the
token brings: targets by solvers, and nothing else differs from UniErase's settings), `sequential` and `precise`. Each
is one `unierase compare` into a folder of its own, which goes on where it was when it is started again. General ability
is TOFU's, cut to --utility-limit documents.

UniErase takes `smollm2-135m`, the settings for this model's size; the editing baselines take its blocks, and but in
`ablation` their steps, contexts and clamps stay the published ones. Everything else is as published or, in `tuned`, as
the search chose. So few tries would be lost in three dimensions: `tuned` searches the learning rate alone of what is
trained. UniErase is not searched: its shipped settings were chosen on a model of this size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unierase_plugin.cli import app
from unierase_plugin.compare.entries import method_of, parse_method
from unierase_plugin.hparams import HARDENED, UniEraseHyperParams

TRAINING = "ga_gd,ga_kl,npo_gd,npo_kl,me_gd,dpo_gd,dpo_kl,idk_ap,simnpo,rmu,undial,lunar"
#: Blocks, corpus and steps that this model's size allows; a corpus of ordinary text is sampled from the model itself.
SMALL = "@layers=[3,4,5,6,7]@prompt_forms=[chat]@mom2_dataset=self@mom2_n_samples=64"
UNIERASE = "unierase@hparams=smollm2-135m@as=unierase"
#: What of UniErase's settings the editing methods set otherwise; solver, target and token are what `ablation` compares.
SHARED = (
    "context_template_length_params",
    "v_num_grad_steps",
    "clamp_norm_factor",
    "v_share_subject",
    "mom2_update_weight",
    "retain_update_weight",
)
#: Settings of the trained methods that `tuned` leaves as published.
PINNED = ("retain_weight", "beta", "strength", "steering", "coefficient")
PARTS = ("published", "tuned", "ablation", "sequential", "precise")


def editing(method: str, target: str) -> str:
    small = SMALL.replace("[3,4,5,6,7]", "[5]") if method == "rome" else SMALL
    return f"{method}@target={target}{small}@as={method}:{target}"


def methods_of(part: str) -> str:
    if part == "ablation":
        targets = ("idk", "eos", "random_token", "token")
        shared = {name: getattr(UniEraseHyperParams.from_hparams("smollm2-135m"), name) for name in SHARED}
        rows = [editing(method, target) for method in ("rome", "memit", "alphaedit") for target in targets]
        return ",".join([UNIERASE, *(with_settings(row, shared) for row in rows)])
    plain = [UNIERASE, editing("memit", "idk"), editing("alphaedit", "idk")]
    if part == "tuned":
        shipped = UniEraseHyperParams.from_hparams("smollm2-135m")
        by_hand = {name: getattr(shipped, name) for name in ("layers", "clamp_norm_factor", "mom2_update_weight")}
        plain[0] = with_settings(UNIERASE, by_hand)
        hard = with_settings("unierase@hparams=smollm2-135m@as=unierase hardened", {**by_hand, **HARDENED})
        trained = [with_rate_free(name) for name in TRAINING.split(",")]
        return ",".join([*plain, hard, editing("rome", "idk"), *trained, "prompt_guard"])
    if part == "precise":
        return ",".join([*plain, "npo_gd,ga_gd,prompt_guard"])
    return ",".join([*plain, editing("rome", "idk"), TRAINING, "prompt_guard"])


def with_rate_free(name: str) -> str:
    published = method_of(parse_method(name)).hparams()
    pinned = {each: getattr(published, each) for each in PINNED if hasattr(published, each)}
    return with_settings(f"{name}@as={name}", pinned)


def with_settings(written: str, settings: Mapping[str, Any]) -> str:
    """The settings before the row's name, lists without blanks."""
    head, _, label = written.partition("@as=")
    values = {key: f"[{','.join(map(str, v))}]" if isinstance(v, (list, tuple)) else v for key, v in settings.items()}
    return head + "".join(f"@{key}={value}" for key, value in values.items()) + f"@as={label}"


def folder_of(model: str, options: argparse.Namespace) -> Path:
    """A folder, or a model that shared/models/tofu_model.py builds by that name."""
    if Path(model).is_dir():
        return Path(model)
    folder = Path(options.out, "models", model)
    if not folder.is_dir():
        builder = str(options.shared / "models" / "tofu_model.py")
        subprocess.run([sys.executable, builder, "--delta", model, str(folder)], check=True)
    return folder


def facts_of(options: argparse.Namespace) -> tuple[str, str]:
    """Specs of what the model was trained on: forget01's 40, and 160 of TOFU's questions to keep."""
    return f"tofu:forget01[:{options.forget}]", f"{options.kept}[:{options.keep}]"


def run(part: str, options: argparse.Namespace) -> None:
    forget, keep = facts_of(options)
    arguments = [
        "compare",
        "--model",
        str(folder_of(options.model, options)),
        "--forget",
        forget,
        "--retain",
        keep,
        "--reference",
        str(folder_of(options.reference, options)),
        "--methods",
        options.methods or methods_of(part),
        "--out",
        str(Path(options.out, part)),
        "--seeds",
        options.seeds,
        "--limit",
        str(options.limit),
        "--utility-limit",
        str(options.utility_limit),
        "--bisections",
        str(options.bisections),
        "--utility",
        "auto" if options.utility_limit else "none",
        "--dtype",
        options.dtype,
        *(("--budget", str(options.budget)) if part == "tuned" else ()),
        *(("--scenario", part, "--steps", str(options.steps)) if part in ("sequential", "precise") else ()),
        *(("--audit", options.audit) if options.audit and part == "published" else ()),
        *(("--retry",) if options.retry else ()),
    ]
    app(arguments, standalone_mode=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="tofu200")
    parser.add_argument("--reference", default="tofu160r")
    parser.add_argument("--kept", default="tofu:retain_perturbed", help="spec of the facts to keep")
    parser.add_argument("--forget", type=int, default=40)
    parser.add_argument("--keep", type=int, default=160)
    parser.add_argument("--methods", default="", help="in the place of the part's own")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budget", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=int, default=0, help="facts of each part that are asked, at most")
    parser.add_argument("--bisections", type=int, default=4)
    parser.add_argument("--utility-limit", type=int, default=60, help="0 leaves utility out")
    parser.add_argument("--dtype", default="", help="bfloat16 is quicker where the processor multiplies it in hardware")
    parser.add_argument("--audit", default="", help="attacks, for `published`")
    parser.add_argument("--retry", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("UNIERASE_TOFU_DIR", str(options.shared / "data" / "tofu"))
    for part in options.only:
        run(part, options)
        results = json.loads(Path(options.out, part, "results.json").read_text(encoding="utf-8"))
        sys.stdout.write(f"{part}:\n" + "\n".join(f"- {sentence}" for sentence in results["answer"]) + "\n")


if __name__ == "__main__":
    main()
