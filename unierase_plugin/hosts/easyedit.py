"""EasyEdit: `alg_name: UniErase` for its BaseEditor. No file of EasyEdit is changed.

`register` puts our function into EasyEdit's table of algorithms. It also wraps the methods of BaseEditor that fail with
UniErase: requests may have no target, the evaluation puts a space before the target, and only models of known families
are loaded. The wrappers leave other algorithms alone.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

from ..errors import DependencyError, HyperParamsError, shown
from ..facts.request import ForgetRequest
from ..hparams import UniEraseHyperParams
from ..models.literal import tell_special_names
from ..models.thinking import to_answer
from ..plugins.hookspecs import Host
from ..settings.values import coerced

logger = logging.getLogger(__name__)

ALGORITHM = "UniErase"
#: Ending of a set of neighbours that is asked in chat form.
IN_CHAT = "_in_chat"
#: What EasyEdit writes for an answer that is not given.
NO_TRUTH = "<|endoftext|>"
#: How names of special tokens in a text are read.
NAMES_READ = (
    "The edit reads them as text. EasyEdit's evaluation reads them as the tokens, so that its figures for these facts "
    "are those of other texts."
)
#: Methods of BaseEditor that take prompts and targets.
EDITING = ("edit", "batch_edit", "normal_edit", "generate_edit")

#: Their arguments that hold texts, one for each fact or one for all.
TEXTS = ("prompts", "target_new", "ground_truth", "rephrase_prompts", "locality_inputs", "portability_inputs")


class EasyEditHyperParams(UniEraseHyperParams):
    """UniErase's settings as EasyEdit's scripts use settings: any attribute can be set, unknown ones too.

    `model_name` can be set to (model, tokenizer). A value that is set for one of our settings is checked.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        known = {spec.name for spec in fields(self)}
        if name in known and not (name == "model_name" and isinstance(value, tuple)):
            value = coerced(name, value, get_type_hints(UniEraseHyperParams)[name])
        object.__setattr__(self, name, value)
        if name in known:
            self.check()

    def __delattr__(self, name: str) -> None:
        object.__delattr__(self, name)

    @classmethod
    def of(cls, hparams: UniEraseHyperParams) -> EasyEditHyperParams:
        return hparams if isinstance(hparams, cls) else cls(**hparams.as_dict())


class Asked(NamedTuple):
    """A request as `literal.tell_special_names` reads it."""

    label: str
    question: str
    answer: str


class Aim(str):
    """The target in EasyEdit's requests and metrics: the token, and the wanted text after it where there is one.

    EasyEdit puts a space between a prompt and its target. No space may stand before the token, so it is removed here.
    """

    #: The wanted text.
    wanted: str | None

    def __new__(cls, text: str, wanted: str | None = None) -> Aim:
        made = super().__new__(cls, text)
        made.wanted = wanted
        return made

    @classmethod
    def at(cls, target: Any, token: str) -> Aim:
        """target: a text, or None for an "I don't know" sentence. That is chosen when the model is edited."""
        if isinstance(target, cls):
            return target
        wanted = target.strip() if isinstance(target, str) else ""
        return cls(token + wanted, wanted or None)

    def __radd__(self, before: str) -> str:
        return before.removesuffix(" ").__add__(self)


def apply_unierase_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Mapping[str, Any]],
    hparams: UniEraseHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    train_ds: Any = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Makes the model forget what the requests ask. It has the signature of EasyEdit's algorithms.

    requests   mappings with `prompt`, and optionally `subject`, `ground_truth`, `case_id` and `target_new`. The last is
               the text that follows the token; without it, an "I don't know" sentence follows

    Returns the model and its weights before the edit, by name. The model is edited in place unless `copy` is set. A
    model that was edited before and not restored is edited further. Raises a UniEraseError that names the value and the
    remedy; the model is then as before.
    """
    from .in_place import edit_in_place, plain_hparams

    facts = [_fact(request, index) for index, request in enumerate(requests)]
    # The editor has already told of requests that come through it, and of the texts that only EasyEdit reads.
    told = all(isinstance(request.get("target_new"), Aim) for request in requests)
    edited, originals = edit_in_place(model, tok, facts, plain_hparams(hparams), copy=copy, told=told)
    return edited, originals if return_orig_weights or keep_original_weight else {}


def _fact(request: Mapping[str, Any], index: int) -> ForgetRequest:
    from .in_place import make_request

    target, answer = request.get("target_new"), request.get("ground_truth")
    target = target.wanted if isinstance(target, Aim) else target
    answer = answer[0] if isinstance(answer, (list, tuple)) and answer else answer
    answer = None if answer == NO_TRUTH else answer
    wanted = target.strip() or None if isinstance(target, str) else target
    return make_request(request, index, answer=answer, target=wanted)


def register() -> None:
    """Adds the algorithm UniErase to EasyEdit. A second call does nothing.

    Raises DependencyError where EasyEdit is not installed or lacks something.
    """
    try:
        import easyeditor
        from easyeditor.editors.editor import BaseEditor
        from easyeditor.util.alg_dict import ALG_DICT
    except ImportError as error:
        raise DependencyError(
            "EasyEdit cannot be imported. It is no package: clone zjunlp/EasyEdit, install its requirements.txt, and "
            f"put the folder on PYTHONPATH ({error})."
        ) from error
    if ALG_DICT.get(ALGORITHM) is apply_unierase_to_model:
        return
    ALG_DICT[ALGORITHM] = apply_unierase_to_model
    _make_batchable()
    _wrap(BaseEditor, "__init__", _with_our_model)
    for name in (each for each in EDITING if hasattr(BaseEditor, each)):
        _wrap(BaseEditor, name, _with_aims)
    if hasattr(BaseEditor, "edit_requests"):
        _wrap(BaseEditor, "edit_requests", _with_aims_in_requests)
    # Its scripts import the classes of settings from there.
    easyeditor.UniEraseHyperParams = EasyEditHyperParams


def _make_batchable() -> None:
    from easyeditor.editors.batch_editor import BatchEditor

    theirs = BatchEditor.is_batchable_method

    def is_batchable_method(alg_name: str) -> bool:
        return alg_name == ALGORITHM or bool(theirs(alg_name))

    BatchEditor.is_batchable_method = staticmethod(is_batchable_method)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    theirs = getattr(owner, name)

    @functools.wraps(theirs)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(theirs, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _with_our_model(theirs: Callable[..., None], editor: Any, hparams: Any) -> None:
    """BaseEditor's constructor, which gets the loaded model.

    By name it loads known families only, some with slow tokenizers, which give no character offsets.
    """
    if not isinstance(hparams, UniEraseHyperParams):
        if getattr(hparams, "alg_name", None) == ALGORITHM:
            raise HyperParamsError(
                f"alg_name {ALGORITHM!r} takes UniEraseHyperParams, not {type(hparams).__name__}: "
                "UniEraseHyperParams.from_hparams(FILE)."
            )
        return theirs(editor, hparams)
    hparams = EasyEditHyperParams.of(hparams)
    model, tok = _load(hparams)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    # The evaluation then asks in the form of the edit.
    if not hasattr(hparams, "use_chat_template"):
        hparams.use_chat_template = hparams.prompt_forms[0] == "chat" and bool(tok.chat_template)
    given = hparams.model_name
    hparams.model_name = (model, tok)
    try:
        theirs(editor, hparams)
    finally:
        hparams.model_name = given if isinstance(given, str) else name
    editor.model_name = hparams.model_name
    # EasyEdit does so for every algorithm that is not on its list, so that generation goes on from the prompt's end.
    tok.padding_side = "left"
    return None


def _load(hparams: EasyEditHyperParams) -> tuple[Any, Any]:
    from ..models.architecture import refuse_unfit
    from ..models.loading import load

    named: Any = hparams.model_name
    if isinstance(named, tuple):
        refuse_unfit(named[0])
        return named
    if not named:
        raise HyperParamsError("model_name is empty: name the folder or hub id of the model to edit.")
    device = f"cuda:{hparams.device}" if hparams.device.isdigit() else hparams.device
    return load(named, "auto" if hparams.model_parallel else device, "float16" if hparams.fp16 else "float32")


def _with_aims(theirs: Callable[..., Any], editor: Any, *args: Any, **kwargs: Any) -> Any:
    """A method of BaseEditor with our targets in `target_new`, which the caller may leave out."""
    if editor.alg_name != ALGORITHM:
        return theirs(editor, *args, **kwargs)
    bound = inspect.signature(theirs).bind_partial(editor, *args, **kwargs)
    prompts, targets = bound.arguments.get("prompts"), bound.arguments.get("target_new")
    if isinstance(prompts, list) and (targets is None or isinstance(targets, (list, tuple))):
        wanted = [None] * len(prompts) if targets is None else targets
        bound.arguments["target_new"] = [_aim(editor, target) for target in wanted]
    elif isinstance(prompts, str):
        bound.arguments["target_new"] = _aim(editor, targets)
    # `edit` calls `edit_requests`, which does the rest.
    if theirs.__name__ != "edit":
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        texts = {name: given[name] for name in TEXTS if name in given}
        count = len(prompts) if isinstance(prompts, (list, tuple)) else 1
        _tell_of_names(editor, [_at(texts, index) for index in range(count)])
        if bound.arguments.get("locality_inputs"):
            _tell_of_figures(editor, True)
            bound.arguments["locality_inputs"] = _asked_in_chat_too(editor, bound.arguments["locality_inputs"])
    return theirs(*bound.args, **bound.kwargs)


def _with_aims_in_requests(theirs: Callable[..., Any], editor: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
    if editor.alg_name == ALGORITHM:
        _tell_of_names(editor, requests)
        _tell_of_figures(editor, any(each.get("locality") for each in requests))
        # EasyEdit edits one request at a time, which then has no place to be named by.
        requests = [
            {
                "case_id": index,
                **each,
                "target_new": _aim(editor, each.get("target_new")),
                **({"locality": _asked_in_chat_too(editor, each["locality"])} if each.get("locality") else {}),
            }
            for index, each in enumerate(requests)
        ]
    return theirs(editor, requests, *args, **kwargs)


def _asked_in_chat_too(editor: Any, locality: Mapping[str, Any]) -> dict[str, Any]:
    """EasyEdit's sets of neighbours, and each set once more in chat form where the edit is in chat form.

    EasyEdit always asks locality as bare text, and has no setting for that.
    """
    if not _acts_in_chat(editor):
        return dict(locality)

    def asked(prompt: Any) -> Any:
        if isinstance(prompt, (list, tuple)):
            return [asked(each) for each in prompt]
        turns = [{"role": "user", "content": prompt}]
        return prompt and to_answer(editor.tok, turns)

    both: dict[str, Any] = {}
    for name, neighbours in locality.items():
        both[name] = neighbours
        if not name.endswith(IN_CHAT):
            both.setdefault(name + IN_CHAT, {**neighbours, "prompt": asked(neighbours["prompt"])})
    return both


def _acts_in_chat(editor: Any) -> bool:
    """Whether the edit is in chat form and EasyEdit's evaluation is not. It is where generated text is judged."""
    generates = getattr(editor.hparams, "evaluation_type", None) in ("LLM-judge", "generate-text")
    return bool(getattr(editor.hparams, "use_chat_template", False) and editor.tok.chat_template) and not generates


def _tell_of_figures(editor: Any, locality: bool) -> None:
    """Warns of figures of EasyEdit that are easily misread."""
    token = editor.hparams.unlearning_token
    if token not in editor.tok.get_vocab():
        logger.warning(
            "pre.rewrite_acc counts the pieces into which the tokenizer splits %r before the edit. It is no accuracy: "
            "it is above 0 where the model guesses one piece from the others.",
            token,
        )
    if locality and _acts_in_chat(editor):
        logger.warning(
            "EasyEdit asks locality as bare text. An edit in chat form hardly acts there, so that 1.0 says little. "
            "NAME%s_acc beside NAME_acc asks the same neighbours in chat form.",
            IN_CHAT,
        )


def _tell_of_names(editor: Any, requests: Sequence[Mapping[str, Any]]) -> None:
    """Warns of requests with names of special tokens in any text, also in texts that only EasyEdit reads."""
    facts = [
        Asked(shown(each.get("case_id", index)), "", "\0".join(_texts(each))) for index, each in enumerate(requests)
    ]
    tell_special_names(editor.tok, facts, [editor.hparams.unlearning_token], NAMES_READ)


def _at(value: Any, index: int) -> Any:
    """The part of the arguments that belongs to one fact, where they hold a list with one text for each."""
    if isinstance(value, Mapping):
        return {name: _at(each, index) for name, each in value.items()}
    return value[index : index + 1] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> Iterator[str]:
    """All texts of a request, without those that EasyEdit or this module wrote."""
    value = value.wanted if isinstance(value, Aim) else value
    if isinstance(value, str) and value != NO_TRUTH:
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from () if str(name).endswith(IN_CHAT) else _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _aim(editor: Any, target: Any) -> Aim:
    return Aim.at(target, editor.hparams.unlearning_token)


EASYEDIT = Host("easyedit", "alg_name UniErase for EasyEdit (zjunlp/EasyEdit)", "easyeditor", register)
