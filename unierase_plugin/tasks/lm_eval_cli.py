"""lm-eval's own command line, with this package's tasks and a shorter way to name a model."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..errors import DependencyError, UniEraseError, did_you_mean, reason, shown
from ..models.adapters import adapter_base, refuse_without_peft
from ..models.prompts import has_chat_template
from .answer_form import loaded_tokenizer
from .task_checks import check_tasks, every_task_checked, our_tasks
from .task_manager import MODEL_TYPE, hand_on_metadata, is_model_type, our_tasks_found, register_model_type, replaced

#: Our group of lm-eval's own tasks. They are asked as lm-eval asks them.
GENERAL = "unlearning_utility"
#: lm-eval's names for its own Hugging Face model type.
HF = ("hf", "hf-auto", "huggingface")

HELP = """\
Usage: unierase eval --model DIR --tasks TASK[,TASK...] [lm-eval's options]

Runs lm-eval with this package's tasks beside its own. All of lm-eval's options work and mean what they mean there:
--limit 10, --batch_size 8, --output_path DIR, --log_samples, --device cuda, --include_path DIR, ...
`lm_eval run --help` lists them.

  --model DIR             A folder or hub id of a causal language model or of a PEFT adapter, or one of lm-eval's model
                          types (hf, vllm, ...), with lm-eval's own --model_args.
  --tasks TASK            Every task of lm-eval, and these:
                            tofu                  tofu_forget10 and tofu_utility: forget quality and model utility
                            tofu_forget, tofu_forget01, tofu_forget05, tofu_forget10
                            tofu_utility          model utility over tofu_retain, tofu_real_authors, tofu_world_facts
                            tofu_forget01_paraphrase, tofu_forget05_paraphrase, tofu_forget10_paraphrase,
                            tofu_retain_paraphrase
                            return_forget, return_retain
                            unierase_demo, unierase_demo_forget, unierase_demo_retain
                            unlearning_utility    lm-eval's mmlu, triviaqa, gsm8k and humaneval
                          Tasks of plugins' benchmarks are found too (`unierase eval ls tasks`).
  --apply_chat_template   With --model DIR and tasks of this package, this is the default if the tokenizer has a chat
                          template. `--apply_chat_template false` asks in plain text.
  --metadata JSON         '{"reference": "DIR", "data_dir": "DIR"}' and more; docs/reference/tasks.md has all keys:
                            reference             folder of the retain-only model's run of this task (--log_samples)
                            data_dir, return_dir  folders of TOFU and RETURN (over UNIERASE_TOFU_DIR, _RETURN_DIR)
                            metrics               ["NAME"]: metrics of plugins too (`unierase plugins`)
                            semantic              true: cosine similarity, entailment and a gibberish detector too
                            unlearning_token      the name of the token if it is not <unlearn_0>

Examples: unierase eval --model forgotten --tasks unierase_demo
          unierase eval --model retain_only --tasks tofu_forget10 --log_samples --output_path reference
          unierase eval --model forgotten --tasks tofu --metadata '{"reference": "reference"}' --output_path results
"""


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Runs lm-eval's command line on `arguments`. It knows our tasks, and `--model DIR` names a folder or hub id.

    Raises DependencyError if lm-eval is missing, UniEraseError for a task, a model or settings that cannot be used.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        typer.echo(HELP)
        return
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise DependencyError(f"`unierase eval` needs lm-eval: pip install lm-eval ({error}).") from error
    hand_on_metadata()
    register_model_type()
    known, rest = _parser().parse_known_args(arguments)
    known.tasks = [name for part in known.tasks for name in part.split(",") if name]
    if not _elsewhere(known, arguments):
        _check_named(known)
    ours = our_tasks() - {GENERAL}
    only_ours = bool(known.tasks) and ours.issuperset(known.tasks)
    check_tasks([name for name in known.tasks if name in ours], _metadata(known), known.num_fewshot)
    if only_ours:
        _check_metadata(known.metadata)
    if known.model is not None and not is_model_type(known.model):
        if adapter_base(known.model, exported=True):
            refuse_without_peft(known.model)
        arguments = [*rest, *_spelt_out(known, ours)]
    look = functools.partial(_refuse_unknown, known.tasks)
    # lm-eval reads its arguments from sys.argv alone.
    command_line = replaced(sys, "argv", ["lm_eval", *arguments])
    with our_tasks_found(only_ours, look), every_task_checked(), _hf_is_whole(), command_line:
        cli_evaluate()


def _elsewhere(known: argparse.Namespace, arguments: Sequence[str]) -> bool:
    """Whether nothing is evaluated (`ls`, `validate`, help), or a file names the model and the tasks."""
    return known.config is not None or arguments[0] in ("ls", "validate") or not {"-h", "--help"}.isdisjoint(arguments)


def _check_named(known: argparse.Namespace) -> None:
    if not (known.model or known.model_args):
        raise UniEraseError("No model is named: --model DIR, a folder or a hub id (`unierase eval --help`).")
    if not known.tasks:
        raise UniEraseError("No tasks are named: --tasks TASK[,TASK...] (`unierase eval --help` lists ours).")


def _check_metadata(given: Sequence[str]) -> None:
    """Refuses a misspelt key. lm-eval would ignore it silently."""
    from .facts import SETTINGS

    for key in _read_settings(given).keys() - SETTINGS:
        hint = did_you_mean(key, SETTINGS)
        if hint:
            raise UniEraseError(f"--metadata has a key {shown(key)} that no task here reads.{hint}")


# --- arguments -----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    """Parses the few options of lm-eval that are needed here, as lm-eval parses them."""
    parser = argparse.ArgumentParser("unierase eval", add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    parser.add_argument("--tasks", "-t", nargs="+", action="extend", default=[])
    parser.add_argument("--model_args", "-a", nargs="+", action="extend", default=[])
    parser.add_argument("--metadata", nargs="+", action="extend", default=[])
    parser.add_argument("--num_fewshot", "-f", type=int)
    parser.add_argument("--config", "-C")
    parser.add_argument("--apply_chat_template", nargs="?", const="true", type=_form)
    return parser


def _form(text: str) -> str:
    """The name of a template as it is; true and false in lower case."""
    return text.casefold() if text.casefold() in ("true", "false") else text


def _spelt_out(known: argparse.Namespace, ours: frozenset[str]) -> list[str]:
    """The parsed options as lm-eval takes them, for a model that is named by a folder or hub id."""
    kind, chat = "hf", known.apply_chat_template
    model_args: dict[str, Any] = {"pretrained": known.model}
    metadata: dict[str, Any] = {}
    if not ours.isdisjoint(known.tasks):
        kind, metadata = MODEL_TYPE, {"token_shown": True}
        chat = _form_of_facts(known.model, chat, sorted(set(known.tasks) - ours))
        if chat != "false":
            # The chat template writes the start token itself.
            model_args["add_bos_token"] = False
    return [
        *("--model", kind, "--model_args", _joined(model_args, known.model_args)),
        *(("--tasks", ",".join(known.tasks)) if known.tasks else ()),
        *(("--metadata", _joined(metadata, known.metadata)) if metadata or known.metadata else ()),
        *(("--num_fewshot", str(known.num_fewshot)) if known.num_fewshot is not None else ()),
        *(("--config", known.config) if known.config is not None else ()),
        *_chat_arguments(chat),
    ]


def _metadata(known: argparse.Namespace) -> dict[str, Any]:
    """The settings that lm-eval gives to tasks: the model's arguments, then the metadata, which win."""
    found: dict[str, Any] = {} if known.model is None else {"pretrained": known.model}
    return found | _read_settings(known.model_args) | _read_settings(known.metadata)


def _read_settings(given: Sequence[str]) -> dict[str, Any]:
    """Reads JSON, or KEY=VALUE pairs with commas between them, as lm-eval does."""
    from lm_eval.utils import simple_parse_args_string

    found: dict[str, Any] = (
        json.loads(_joined({}, given)) if _is_json(given) else (simple_parse_args_string(",".join(given)))
    )
    return found


def _is_json(given: Sequence[str]) -> bool:
    return not given or given[0].lstrip().startswith("{")


def _form_of_facts(model: str, chat: str | None, others: Sequence[str]) -> str:
    """`--apply_chat_template` for our tasks: the given value, else true if the tokenizer has a chat template.

    others: lm-eval's own tasks in the same run.
    """
    problem = f"--model {shown(model)} is not one of lm-eval's model types, and no tokenizer can be loaded from there."
    templated = has_chat_template(loaded_tokenizer(model, problem, "Give a folder or a hub id"))
    if chat is None and templated and others:
        raise UniEraseError(
            f"Tasks of this package are asked in chat form by default, lm-eval's own ({', '.join(others)}) in plain "
            "text. To run both at once, choose: --apply_chat_template, or --apply_chat_template false."
        )
    if chat not in (None, "false") and not templated:
        raise UniEraseError(
            f"The tokenizer in {shown(model)} has no chat template. Leave --apply_chat_template out to ask in plain "
            "text."
        )
    return chat or str(templated).casefold()


def _chat_arguments(chat: str | None) -> list[str]:
    if chat is None or chat == "false":
        return []
    return ["--apply_chat_template", *([] if chat == "true" else [chat])]


def _joined(settings: Mapping[str, Any], given: Sequence[str]) -> str:
    """Joins settings with those of the user, which win, into one argument that every version of lm-eval reads."""
    if not _is_json(given):
        return ",".join([*(f"{key}={value}" for key, value in settings.items()), *given])
    try:
        return json.dumps({**settings, **json.loads(given[0] if given else "{}")})
    except (ValueError, RecursionError) as error:
        hint = "Use double quotes inside, single quotes around."
        raise UniEraseError(f"Not JSON: {shown(given[0])} ({reason(error)}). {hint}") from error


# --- around lm-eval ------------------------------------------------------------------------------------------------


def _refuse_unknown(names: Sequence[str], manager: Any) -> None:
    from lm_eval.utils import pattern_match

    for name in names:
        if not (pattern_match([name], manager.all_tasks) or name.endswith(".yaml") or Path(name).is_dir()):
            hint = did_you_mean(name, manager.all_tasks)
            raise UniEraseError(f"There is no task {shown(name)}.{hint} `unierase eval ls tasks` lists all.")


@contextmanager
def _hf_is_whole() -> Iterator[None]:
    """Inside, lm-eval's model type `hf` opens models as `unierase_hf` does (`lm_eval_model.WholeHF`)."""
    from lm_eval.api import registry

    original = registry.get_model

    def get_model(name: str) -> Any:
        found = original(name)
        if name not in HF:
            return found
        from lm_eval.models.huggingface import HFLM

        from .lm_eval_model import WholeHF

        return WholeHF if found is HFLM else found

    with replaced(registry, "get_model", get_model):
        yield
