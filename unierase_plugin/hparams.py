"""Hyper-parameters: typed, validated, read from YAML. `HyperParams` is what every method's derive from.

UniErase's have EasyEdit's layout.

Key names that EasyEdit already has (`layers`, `v_lr`, `mom2_update_weight`, ...) are kept; what UniErase adds comes
after them. Every shipped file lies in `hparams/UniErase/` and is found by its stem.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

from .errors import HyperParamsError, did_you_mean, shown
from .settings.ranges import Range, positive, weight
from .settings.values import checked_seed, checked_template_arguments, coerced, in_words
from .storage.inputs import YAML_BYTES, checked_path, parse_yaml, read_text

if TYPE_CHECKING:
    from typing_extensions import Self

FACT_TOKENS = ("subject_last", "last")
PROMPT_FORMS = ("chat", "plain", "bare")
#: What can be done beyond the paper's method against attacks (docs/explanation/hardening.md); each can be had alone.
HARDENINGS = ("forms", "paraphrases", "unlikely_answer", "second_refusal", "answer_span")
#: A block's number, or -1 for one that is chosen by the model's depth.
LAYERS = Range(-1, 1e6)
#: Tokens of a text put before a prompt, and how many of one length, at most.
CONTEXTS_MOST = 1000
#: What `--harden` sets: the ways that earned it, by the tables there, and the longer way in more steps that they need.
HARDENED: Mapping[str, Any] = {
    "harden": ("unlikely_answer", "second_refusal"),
    "clamp_norm_factor": 3.0,
    "v_lr": 0.2,
    "v_num_grad_steps": 60,
}
#: What `--remove` sets: a removal, and neighbours. Without them it takes facts that nobody gave
#: (docs/explanation/precision.md).
REMOVED: Mapping[str, Any] = {"remove": True, "retain_neighbours": 6}


@dataclass(frozen=True)
class HyperParams:
    """Base of a method's settings: a frozen dataclass whose fields all have defaults. These fields every method has.

    Values are turned into the declared types (str, int, float, bool, dict, tuple[...]). A value that does not fit, and
    a key that is no field, raise HyperParamsError.
    """

    #: Folder or hub id of the model that the file was made for. A model given on the command line wins.
    model_name: str = ""
    #: Forms of the question: through the chat template, as "Question: ... Answer:", or the bare text. The first one is
    #: how the model is asked before and after.
    prompt_forms: tuple[str, ...] = ("chat",)
    #: Extra arguments of the tokenizer's chat template, for example {enable_thinking: false}.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    #: Where the model is loaded; empty for a GPU where there is one.
    device: str = ""
    #: Tokens of one batch at most; 0 chooses by device.
    max_batch_tokens: int = 0
    #: Of everything random.
    seed: int = 0

    #: Folder under `hparams/` where this package ships files for the class; empty for none.
    folder: ClassVar[str] = ""
    #: Ranges of numbers by name, beside those of the classes that this one derives from.
    ranges: ClassVar[Mapping[str, Range]] = {"max_batch_tokens": weight(2**40)}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = coerced(spec.name, getattr(self, spec.name), hints[spec.name])
            object.__setattr__(self, spec.name, value)
        self.check()

    def check(self) -> None:
        """Raises HyperParamsError for a value out of its range; called once the types are right."""
        checked_seed(self.seed)
        checked_template_arguments(self.chat_template_kwargs)
        unknown = [form for form in self.prompt_forms if form not in PROMPT_FORMS]
        if unknown or not self.prompt_forms:
            raise HyperParamsError(
                f"prompt_forms = {shown(list(self.prompt_forms))} must name some of: {', '.join(PROMPT_FORMS)}."
            )
        for name, allowed in self.all_ranges().items():
            allowed.check(name, getattr(self, name))
        self.validate()

    @classmethod
    def all_ranges(cls) -> dict[str, Range]:
        """Ranges of this class' settings; what a class says goes before what it derives from says."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        named = [vars(each).get("ranges", {}) for each in reversed(cls.__mro__)]
        return {name: allowed for ranges in named for name, allowed in ranges.items() if name in known}

    def validate(self) -> None:
        """Raises HyperParamsError for what ranges of single numbers do not tell."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises HyperParamsError for an unknown key, naming the nearest known one."""
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise HyperParamsError(
                    f"Unknown hyper-parameter {shown(key)}.{did_you_mean(str(key), known)} Known: {', '.join(known)}."
                )
        return cls(**values)

    @classmethod
    def from_hparams(cls, name_or_path: str | Path) -> Self:
        """Reads a YAML file, or the shipped one of that name (`smollm2-135m`); EasyEdit's constructor name.

        Raises HyperParamsError with the file, and the line of the setting that it refuses.
        """
        path = find_hparams(name_or_path, cls.folder)
        values, lines = _read_yaml(path)
        try:
            return cls.from_dict(values)
        except HyperParamsError as error:
            line = next((f", line {lines[str(key)]}" for key in values if not cls._takes({key: values[key]})), "")
            raise HyperParamsError(f"{path}{line}: {error}") from error

    @classmethod
    def _takes(cls, values: Mapping[str, Any]) -> bool:
        try:
            cls.from_dict(values)
        except HyperParamsError:
            return False
        return True

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """The constructor's name in ROME's family; JSON is YAML too."""
        return cls.from_hparams(path)

    @classmethod
    def for_model(cls, model: str) -> Self:
        """The shipped file whose model_name ends like the model's name; else the defaults."""
        wanted = Path(model).name.casefold()
        for path in shipped_hparams(cls.folder).values():
            found = cls.from_hparams(path)
            if Path(found.model_name).name.casefold() == wanted:
                return found
        return cls()

    def replace(self, **changes: Any) -> Self:
        return self.from_dict({**self.as_dict(), **changes})

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def fingerprint(self, *names: str) -> str:
        """Hex digest of the named values (all of them where none is named)."""
        values = self.as_dict()
        chosen = {name: values[name] for name in (names or sorted(values))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EditSettings(HyperParams):
    """What every method has that changes MLP output projections in closed form."""

    #: Questions around each request that the model is asked, and that join what is to be kept with its answers: how
    #: many at most; 0 for none (docs/explanation/precision.md).
    retain_neighbours: int = 0
    #: Module templates, found by looking when empty.
    rewrite_module_tmp: str = ""
    layer_module_tmp: str = ""

    ranges: ClassVar[Mapping[str, Range]] = {"retain_neighbours": weight(1e4)}


@dataclass(frozen=True)
class RemovalSettings(EditSettings):
    """What shapes a removal (docs/explanation/removal.md), by itself or before an edit. Blocks count from 0."""

    #: Passes of distillation: each is one forward and one backward over the facts, and a ridge solve a block.
    removal_passes: int = 4
    #: Most passes after them in which declining is learned as well; none where nothing is to be said instead. Before
    #: them what is to be declined still looks like what is to be kept.
    removal_decline_passes: int = 8
    #: Nats at which declining counts as learned, so that no more of these passes follow: the negative log-likelihood
    #: of what is to be said, as the report has it. 0 takes all of them.
    removal_decline_nll: float = 0.9
    #: Blocks that are changed; empty for all but block 0.
    removal_layers: tuple[int, ...] = ()
    #: Blocks that the teacher is made in; empty for the first seven tenths.
    removal_teacher_layers: tuple[int, ...] = ()
    #: Whether facts are first asked of invented subjects, and only those that this does not make the model forget are
    #: taught by the filter.
    removal_strangers: bool = True
    #: Mean probability that the filter is to leave to the forgotten answers: that of a model that never knew them.
    removal_teacher_probability: float = 0.05
    #: Weights in a pass' ridge of the retain set's second moment and of that of the neighbours, each by itself, of
    #: ordinary text's, and of that of the forgotten facts' words in any order.
    removal_retain_weight: float = 40.0
    removal_text_weight: float = 1.0
    removal_words_weight: float = 1.0
    #: Added to the ridge's diagonal, as a share of its mean.
    removal_ridge: float = 0.003
    #: The same for the second moment of gradients at the projections' outputs.
    removal_output_ridge: float = 0.03
    #: Weight of staying with the unedited model on the retain set's answers, and on the neighbours', against following
    #: the teacher: of the mean over all tokens of an answer, few of which tell the fact.
    removal_keep_weight: float = 8.0
    #: Weight of what is to be said instead of a forgotten answer, the token before all, against following the teacher.
    removal_decline_weight: float = 0.3
    #: Tokens of facts to keep, with their questions, that are read, and as many of neighbours; evenly spaced facts.
    removal_kept_tokens: int = 6144
    #: Rank that a block's whole change is cut to; 0 keeps all of it.
    removal_rank: int = 128

    ranges: ClassVar[Mapping[str, Range]] = {
        "removal_passes": weight(1000),
        "removal_decline_passes": weight(1000),
        "removal_decline_nll": weight(),
        "removal_teacher_probability": Range(0, 1, above=True, below=True),
        "removal_retain_weight": weight(),
        "removal_text_weight": weight(),
        "removal_words_weight": weight(),
        "removal_ridge": positive(1e6),
        "removal_output_ridge": positive(1e6),
        "removal_keep_weight": weight(),
        "removal_decline_weight": weight(),
        "removal_kept_tokens": weight(1e9),
        "removal_rank": weight(1e6),
    }

    def validate(self) -> None:
        super().validate()
        for name in ("removal_layers", "removal_teacher_layers"):
            layers = getattr(self, name)
            if any(layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
                raise HyperParamsError(
                    f"{name} = {shown(list(layers))} must be ascending block numbers from 0, each once."
                )


@dataclass(frozen=True)
class EngineSettings(EditSettings):
    """Everything that shapes an edit of the engine, and nothing that does not. Steps are optimiser steps."""

    # --- where -------------------------------------------------------------------------------------------------------
    alg_name: str = "UniErase"
    #: Blocks to edit, ascending, counted from 0; the last one is where the value is optimised.
    layers: tuple[int, ...] = ()
    #: Which token of the prompt carries the edit: the subject's last one, or the prompt's last.
    fact_token: str = "subject_last"
    #: [length in tokens, how many] of the texts put before a prompt, generated by the model (MEMIT, section 4.3).
    context_template_length_params: tuple[tuple[int, int], ...] = ()

    # --- values (z) ---------------------------------------------------------------------------------------------------
    #: Optimiser steps at most; a request stops earlier once its loss is under `v_stop_loss`.
    v_num_grad_steps: int = 40
    #: Adam's step in units of the hidden state's root mean square, so that it means the same on every model.
    v_lr: float = 0.1
    #: Weight of |delta| / |h|^2.
    v_weight_decay: float = 0.5
    #: Weight of the KL term that keeps what the model says of "{subject} is a".
    kl_factor: float = 0.0625
    #: Largest |delta| as a multiple of |h|.
    clamp_norm_factor: float = 1.0
    #: Weight of the "I don't know" sentence after the token in the value's objective; 0 aims at the token alone.
    v_continuation_weight: float = 8.0
    #: Whether requests about one subject share one delta: their keys nearly coincide, so that no linear map could give
    #: each its own.
    v_share_subject: bool = True
    #: A request's optimisation ends once the weighted mean of the negative log-likelihoods that it aims at, the token's
    #: and the sentence's, is below this (nats).
    v_stop_loss: float = 0.05

    # --- hardening (docs/explanation/hardening.md) --------------------------------------------------------------------
    #: Against attacks on the edit, any of: forms (all prompt forms), paraphrases (reworded questions too),
    #: unlikely_answer (the true answer is made improbable with the token masked), second_refusal (the sentence is made
    #: probable with the token masked), answer_span (edits inside the answer too). Nothing is the paper's method.
    harden: tuple[str, ...] = ()
    #: Weight of the answer's improbability in the value's objective under unlikely_answer.
    v_unlikely_weight: float = 4.0

    #: Whether the questions that lead from the answer back to the subject are forgotten too; takes short answers.
    reverse: bool = False

    # --- statistics (C) -----------------------------------------------------------------------------------------------
    #: Corpus of the second moment: a hub dataset's name, a text file, or "self" (text sampled from the model).
    mom2_dataset: str = "self"
    #: How many texts of the corpus are read.
    mom2_n_samples: int = 64
    #: Length of a text in tokens at most.
    mom2_max_length: int = 128
    #: Precision of a batch's products and of the moments as kept; sums over batches are float64.
    mom2_dtype: str = "float32"
    #: Where statistics and tokens are cached; empty for the user's cache folder.
    stats_dir: str = ""

    # --- solve --------------------------------------------------------------------------------------------------------
    #: "ridge" (MEMIT), "null_space" (AlphaEdit), "exact" (ROME), or the name of a plugin's solver.
    solver: str = "ridge"
    #: lambda: weight of the corpus' second moment against the requests' keys.
    mom2_update_weight: float = 200.0
    #: Weight of the retain set's second moment, in the same units.
    retain_update_weight: float = 200.0
    #: Weight of each single key of what is to be kept, at the positions where an edit would act on it, against one
    #: request's key; 0 leaves them to the moment.
    retain_key_weight: float = 0.0
    #: Null space: eigenvalues of C below this share of the largest one span the free directions.
    nullspace_threshold: float = 2e-2
    #: Null space: ridge term rho.
    L2: float = 10.0

    # --- the unlearning token (Stage I) -------------------------------------------------------------------------------
    unlearning_token: str = "<unlearn_0>"
    token_num_steps: int = 90
    #: How many of the bundled "I don't know" sentences are aimed at; which one a question gets cannot be foreseen, so
    #: many of them are a loss that a small model cannot afford.
    token_num_sentences: int = 5
    token_lr: float = 2e-2
    #: Rows of a training batch.
    token_batch_size: int = 8
    #: The token's probability on ordinary text is held below exp(-margin).
    token_guard_margin: float = 9.0
    #: Weight of that hinge.
    token_guard_weight: float = 0.3
    #: Noise on the projections to be edited while the token is trained, as a multiple of the size that the coming edit
    #: is expected to have.
    token_noise: float = 1.0
    #: Whether the "I don't know" sentence is closed by the token again, as in the paper's objective.
    token_closes_answer: bool = False

    # --- read by EasyEdit alone (hosts/easyedit.py) -------------------------------------------------------------------
    #: Requests of one edit in `batch_edit`; `edit` wants 1.
    batch_size: int = 1
    #: Tokens of a prompt in its evaluation; prompts with longer targets are not cut.
    max_length: int = 40
    #: Whether it spreads the model over all GPUs.
    model_parallel: bool = False
    #: Whether it loads the model in float16; else float32.
    fp16: bool = False

    # --- removal (docs/explanation/removal.md) ------------------------------------------------------------------------
    #: Whether what the model knows of the facts is removed; what it says instead is then learned in the same passes.
    remove: bool = False

    #: Far beyond what anyone has used, and short of what gives an edit that does nothing, NaN, or a run without an end.
    ranges: ClassVar[Mapping[str, Range]] = {
        "v_num_grad_steps": positive(1e5),
        "v_lr": positive(100),
        "v_weight_decay": weight(1e6),
        "kl_factor": weight(1e6),
        "clamp_norm_factor": Range(1e-3, 1e3),
        "v_continuation_weight": weight(1e6),
        "v_stop_loss": weight(1e6),
        "v_unlikely_weight": weight(1e6),
        "mom2_n_samples": positive(1e8),
        "mom2_max_length": positive(1e7),
        "mom2_update_weight": Range(1e-9, 1e12),
        "retain_update_weight": weight(),
        "retain_key_weight": weight(),
        "nullspace_threshold": Range(0, 1, above=True, below=True),
        "L2": Range(1e-12, 1e12),
        "token_num_steps": positive(1e6),
        "token_num_sentences": positive(1e6),
        "token_lr": positive(100),
        "token_batch_size": positive(1e6),
        "token_guard_margin": weight(1e3),
        "token_guard_weight": weight(1e6),
        "token_noise": weight(1e3),
        "batch_size": positive(1e9),
        "max_length": positive(1e7),
    }

    def validate(self) -> None:
        super().validate()
        _validate(self)


@dataclass(frozen=True)
class UniEraseHyperParams(RemovalSettings, EngineSettings):
    """UniErase's settings: the engine's, and those of the removal that can go before it. Norms are Euclidean."""

    folder: ClassVar[str] = "UniErase"


def hparams_folder() -> Path:
    """The shipped `hparams/` folder: inside the installed package, or at the top of a checkout."""
    installed = Path(__file__).parent / "hparams"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "hparams"


def shipped_hparams(folder: str = UniEraseHyperParams.folder) -> dict[str, Path]:
    """The files that are shipped in a folder of `hparams/`, by stem; none for an empty name."""
    return {path.stem: path for path in sorted((hparams_folder() / folder).glob("*.yaml"))} if folder else {}


def find_hparams(name_or_path: str | Path, folder: str = UniEraseHyperParams.folder) -> Path:
    """A path that exists, or the file of that stem that is shipped in `folder`.

    `hparams/UniErase/STEM.yaml`, with or without its ending, means the shipped file too where nothing lies there.
    """
    path = checked_path(name_or_path, HyperParamsError)
    if path.is_file():
        return path
    shipped = shipped_hparams(folder)
    stem = path.name.removesuffix(".yaml") if path.parent.name == folder else str(name_or_path)
    if stem in shipped:
        return shipped[stem]
    raise HyperParamsError(
        f"No hyper-parameter file {shown(str(name_or_path))}.{did_you_mean(str(name_or_path), shipped)} "
        f"Give a YAML file{', or one of: ' if shipped else ''}{', '.join(shipped)}."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file. Raises HyperParamsError, with the line, for what is not one mapping in sound YAML."""
    return _read_yaml(path)[0]


def _read_yaml(path: Path) -> tuple[dict[str, Any], Mapping[Any, int]]:
    """The settings, and the line of each."""
    values, lines = parse_yaml(read_text(path, HyperParamsError, YAML_BYTES), str(path), HyperParamsError)
    if not isinstance(values, dict):
        raise HyperParamsError(f"{path} must hold one mapping of hyper-parameters, not {in_words(type(values))}.")
    return values, lines


def _validate(hparams: EngineSettings) -> None:
    if not hparams.solver.isidentifier():  # which names there are is known where plugins are
        raise HyperParamsError(
            f"solver = {shown(hparams.solver)} is no name of a solver. Give ridge, null_space, exact, or a plugin's."
        )
    for name, choices in (("fact_token", FACT_TOKENS), ("mom2_dtype", ("float32", "float64"))):
        value = getattr(hparams, name)
        if value not in choices:
            raise HyperParamsError(f"{name} = {shown(value)} must be one of: {', '.join(choices)}.")
    strange = [name for name in hparams.harden if name not in HARDENINGS]
    if strange:
        raise HyperParamsError(
            f"harden = {shown(list(hparams.harden))} must hold nothing or some of: {', '.join(HARDENINGS)}."
            f"{did_you_mean(strange[0], HARDENINGS)}"
        )
    pairs = hparams.context_template_length_params
    if any(len(pair) != 2 or min(pair) < 1 or max(pair) > CONTEXTS_MOST for pair in pairs):
        raise HyperParamsError(
            f"context_template_length_params = {shown([list(pair) for pair in pairs])} must hold pairs [length, how "
            f"many], both from 1 to {CONTEXTS_MOST}, or nothing."
        )
    if any(layer < 0 for layer in hparams.layers) or list(hparams.layers) != sorted(set(hparams.layers)):
        raise HyperParamsError(
            f"layers = {shown(list(hparams.layers))} must be ascending block numbers from 0, each once."
        )
    if not hparams.unlearning_token.strip():
        raise HyperParamsError("unlearning_token must not be empty.")
