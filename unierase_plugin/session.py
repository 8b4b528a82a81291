"""Opens a model for a command, with a method's settings for it and the edits that it already has.

`unlearn`, `change`, the statistics and the hosts all use this module, so all of them refuse the same input.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .checkpoint import Checkpoint, examine, is_edited
from .errors import CheckpointError, HyperParamsError, UniEraseError
from .facts.request import ForgetRequest, check_not_forgotten, one_spelling
from .hparams import EngineSettings, HyperParams, UniEraseHyperParams
from .methods.contract import Changes, History, Job, Method, Progress
from .models.architecture import refuse_unfit
from .models.chat_templates import check_chat_template
from .models.literal import tell_special_names
from .models.loaded import LoadedModel
from .models.loading import check_stated_blocks, load
from .models.prompts import PLAIN_FORM, has_chat_template
from .models.thinking import tell_thinking
from .plugins.registration import check_solver, registry
from .results import UnlearnResult
from .settings.values import checked_seed
from .statistics.corpus import check_corpus_file
from .storage.cache import cache_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A loaded model, a method with its settings for it, and the edits that earlier calls already applied to it."""

    method: Method[Any]
    loaded: LoadedModel
    hparams: HyperParams
    #: The record of the folder that the model was loaded from, if it was edited before.
    record: Checkpoint | None
    #: Edits that earlier calls already applied to this model.
    history: History | None

    @classmethod
    def open(
        cls,
        method: Method[Any],
        model: Any,
        *,
        tokenizer: Any = None,
        hparams: HyperParams | str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
        device: str = "",
        dtype: str = "",
        anew: bool = False,
    ) -> Session:
        """Opens a model given by name, takes a loaded one, or continues from an earlier call's result.

        options   settings by name; those that are not None replace the hyper-parameters' values
        anew      whether an edited folder counts as any other model, so that its record is not read

        Raises a UniEraseError if model, settings and record do not fit together. Nothing is changed then.
        """
        checked_seed(options.get("seed") or 0)
        record, history = None, None
        if isinstance(model, UnlearnResult):
            _check_same_method(model, method)
            record = None if model.folder is None else examine(model.folder).up_to()
            hparams = model.hparams if hparams is None else hparams
            model, tokenizer, history = model.model, model.tokenizer, model.history
        if isinstance(model, (str, os.PathLike)):
            name = os.fspath(model)
            settings = _with_options(choose_hparams(hparams, name, method.hparams), options, method)
            _check_places(settings)
            record = None if anew else _earlier_record(name, method)
            check_stated_blocks(name, settings)
            model, tokenizer = load(name, device or settings.device, dtype)
            history = _edits_of(record)
        else:
            _check_loaded(model, tokenizer, device or dtype)
            name = _name_of(model)
            settings = _with_options(choose_hparams(hparams, name, method.hparams), options, method)
        settings = method.settle(model, settings)
        _tell_form(name, tokenizer, settings)
        check_chat_template(tokenizer, settings.chat_template_kwargs)
        if "chat" in settings.prompt_forms:
            tell_thinking(tokenizer, settings.chat_template_kwargs)
        loaded = LoadedModel.of(model, tokenizer, name, settings.max_batch_tokens)
        _check_unchanged(loaded.saved_fingerprint, record, name)
        return cls(
            method=method,
            loaded=loaded,
            hparams=settings,
            record=record,
            history=history,
        )

    def job(
        self,
        requests: tuple[ForgetRequest, ...],
        retain: tuple[ForgetRequest, ...],
        work: Path | None,
        progress: Progress,
        told: bool = False,
    ) -> Job[Any]:
        """The method's job on these facts.

        work   the folder in which the method keeps finished phases
        told   whether the caller has reported already which facts hold names of special tokens
        """
        if not told:
            names = [self.hparams.unlearning_token] if isinstance(self.hparams, EngineSettings) else []
            tell_special_names(self.loaded.tokenizer, (*requests, *retain), names)
        return Job(
            loaded=self.loaded,
            requests=requests,
            retain=retain,
            hparams=self.hparams,
            work=work,
            history=self.history,
            progress=progress,
            solvers=registry().solvers,
        )

    def history_after(self, changes: Changes, requests: Sequence[ForgetRequest]) -> History:
        """The edits that the model has after these changes."""
        before = self.history or History(None, (), self.loaded.fingerprint, self.loaded.tokenizer_fingerprint)
        return before.after(changes, requests)

    def forgotten(self, facts: Sequence[ForgetRequest]) -> list[int]:
        """The numbers of the facts that an earlier step forgot."""
        in_memory = self.history.questions if self.history else frozenset[str]()
        found = {index for index, fact in enumerate(facts) if one_spelling(fact.question) in in_memory}
        if self.record is not None:
            found.update(self.record.forgotten(fact.question for fact in facts))
        return sorted(found)

    def check_not_forgotten(self, retain: Sequence[ForgetRequest]) -> None:
        """Raises RequestError for a fact to keep that an earlier step forgot."""
        check_not_forgotten(retain, self.forgotten(retain), self.loaded.name)

    def tell_forgotten(self, requests: Sequence[ForgetRequest]) -> None:
        """Warns of facts that an earlier step forgot already."""
        again = self.forgotten(requests)
        if again:
            logger.warning(
                "An earlier step forgot %d of %d facts to forget already, for example %s. They are forgotten again.",
                len(again),
                len(requests),
                requests[again[0]].label,
            )


def open_model(model: Any, tokenizer: Any = None, *, device: str = "", dtype: str = "") -> LoadedModel:
    """Opens a model given by name, or takes a loaded one with its tokenizer, to read it without changes.

    device and dtype are for a model given by name. Raises a UniEraseError if no model can be loaded.
    """
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        model, tokenizer = load(name, device, dtype)
    else:
        name = _name_of(model)
    return LoadedModel.of(model, tokenizer, name)


def record_of(model: Any) -> Checkpoint | None:
    """The record of a folder's edits; None for a model without one. Raises CheckpointError if it is damaged."""
    return examine(model).up_to() if isinstance(model, (str, os.PathLike)) and is_edited(model) else None


def choose_hparams(
    given: HyperParams | str | os.PathLike[str] | None, model: str, kind: type[HyperParams] = UniEraseHyperParams
) -> HyperParams:
    """The given hyper-parameters, else the shipped file with this model_name, else the defaults of `kind`.

    Raises HyperParamsError for an object of another kind, and for a file with unfit settings.
    """
    if isinstance(given, HyperParams):
        if not isinstance(given, kind):
            raise HyperParamsError(f"This method takes {kind.__name__}, not {type(given).__name__}.")
        return given
    return kind.for_model(model) if given is None else kind.from_hparams(os.fspath(given))


def _with_options(hparams: HyperParams, options: Mapping[str, Any], method: Method[Any]) -> HyperParams:
    """The hyper-parameters, with options in place of settings of the same name."""
    known = hparams.as_dict()
    if options.get("mom2_dataset") is not None and "mom2_dataset" not in known:
        raise HyperParamsError(f"The method {method.name!r} reads no corpus. Leave corpus (--corpus) out.")
    if options.get("harden") is not None and "harden" not in known:
        raise HyperParamsError(f"The method {method.name!r} cannot be hardened; UniErase can. Leave --harden out.")
    if options.get("remove") is not None and "remove" not in known:
        raise HyperParamsError(
            f"The method {method.name!r} cannot be combined with a removal; UniErase, rome, memit and alphaedit can. "
            "--method removal is a removal alone. Leave --remove out."
        )
    if options.get("reverse") and "reverse" not in known:
        raise HyperParamsError(
            f"The method {method.name!r} has no reverse; methods that edit have. Leave --reverse out."
        )
    settings = hparams.replace(
        **{name: value for name, value in options.items() if value is not None and name in known}
    )
    check_solver(settings)
    return settings


def _check_places(settings: HyperParams) -> None:
    """Raises a UniEraseError for a cache or a corpus that cannot be used, before the model is loaded."""
    if isinstance(settings, EngineSettings):
        cache_folder(settings.stats_dir)
    if hasattr(settings, "mom2_dataset"):
        check_corpus_file(settings.mom2_dataset, getattr(settings, "mom2_n_samples", 1))


def _earlier_record(name: str, method: Method[Any]) -> Checkpoint | None:
    """The record of a folder that was edited before. This run continues its steps."""
    found = record_of(name)
    if found is not None and found.manifest["method"] != method.name:
        raise CheckpointError(
            f"{name!r} was made by another method. Start from its base model {found.manifest['model']!r}."
        )
    return found


def _check_same_method(result: UnlearnResult, method: Method[Any]) -> None:
    if result.method != method.name:
        raise CheckpointError(
            f"The model was changed by {result.method!r}, and {method.name!r} cannot continue its steps."
        )


def _edits_of(record: Checkpoint | None) -> History | None:
    if record is None:
        return None
    first = record.manifest
    return History(
        record.token,
        record.edits,
        first.get("working_fingerprint_before") or first["model_fingerprint_before"],
        first.get("tokenizer_fingerprint_before", ""),
    )


def _name_of(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _check_loaded(model: Any, tokenizer: Any, placement: str) -> None:
    if tokenizer is None:
        raise UniEraseError("A loaded model needs its tokenizer: unlearn(model, forget, tokenizer=tokenizer).")
    refuse_unfit(model)
    if placement:
        raise UniEraseError("device and dtype are for models given by name. Move the loaded model yourself.")


def _tell_form(name: str, tokenizer: Any, hparams: HyperParams) -> None:
    if "chat" in hparams.prompt_forms and not has_chat_template(tokenizer):
        logger.warning(
            "%s has no chat template: questions are edited and asked as %r. A chat model needs its chat_template.",
            name,
            PLAIN_FORM,
        )


def _dtype_of(record: Checkpoint | None) -> str:
    """The dtype in which an edited folder was made. In another dtype, its first step could not be taken back."""
    if record is None or record.originals is None:
        return ""
    return str(next(iter(record.originals.projections.values())).dtype).removeprefix("torch.")


def _check_unchanged(fingerprint: str, record: Checkpoint | None, name: str) -> None:
    if record is not None and fingerprint != record.manifest["model_fingerprint_after"]:
        raise CheckpointError(
            f"The weights in {name!r} are not those of its record: they were trained further, or loaded in another "
            f"dtype than {_dtype_of(record) or 'before'}. Leave dtype out, or start from the base model "
            f"{record.manifest['model']!r}."
        )
