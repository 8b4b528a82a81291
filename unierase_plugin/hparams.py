"""Hyper-parameters: typed, validated, read from YAML. The settings of every method derive from `HyperParams`.

UniErase's settings have EasyEdit's layout. They keep the names of EasyEdit's keys (`layers`, `v_lr`,
`mom2_update_weight`, ...), and UniErase's own keys come after them. The shipped files are in `hparams/UniErase/` and
are found by their stem.
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
#: Additions to the paper's method against attacks (docs/explanation/hardening.md). Each can be used alone.
HARDENINGS = ("forms", "paraphrases", "unlikely_answer", "second_refusal", "answer_span")
#: A block's number, or -1 for a block that is chosen by the model's depth.
LAYERS = Range(-1, 1e6)
#: The most tokens of a text before a prompt, and the most texts of one length.
CONTEXTS_MOST = 1000
#: What `--harden` sets: the additions that helped by the tables there, and the longer vectors and more steps they need.
HARDENED: Mapping[str, Any] = {
    "harden": ("unlikely_answer", "second_refusal"),
    "clamp_norm_factor": 3.0,
    "v_lr": 0.2,
    "v_num_grad_steps": 60,
}
#: What `--remove` sets: a removal, and neighbours. Without neighbours, a removal also takes facts that nobody gave it
#: (docs/explanation/precision.md).
REMOVED: Mapping[str, Any] = {"remove": True, "retain_neighbours": 6}


@dataclass(frozen=True)
class HyperParams:
    """Base of a method's settings: a frozen dataclass whose fields all have defaults. Every method has these fields.

    Values are converted to the declared types (str, int, float, bool, dict, tuple[...]). Raises HyperParamsError for a
    value that does not fit, and for a key that is no field.
    """

    #: Folder or hub id of the model that the file was made for. A model on the command line has priority.
    model_name: str = ""
    #: Forms of the question: through the chat template, as "Question: ... Answer:", or the bare text. The first form is
    #: used to judge the model before and after.
    prompt_forms: tuple[str, ...] = ("chat",)
    #: Extra arguments of the tokenizer's chat template, for example {enable_thinking: false}.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    #: Where the model is loaded; empty for a GPU if there is one.
    device: str = ""
    #: The most tokens of one batch; 0 chooses by device.
    max_batch_tokens: int = 0
    #: Seed of all random choices.
    seed: int = 0

    #: Folder under `hparams/` in which this package ships files for the class; empty for none.
    folder: ClassVar[str] = ""
    #: Allowed ranges of numbers by name, in addition to those of the base classes.
    ranges: ClassVar[Mapping[str, Range]] = {"max_batch_tokens": weight(2**40)}

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = coerced(spec.name, getattr(self, spec.name), hints[spec.name])
            object.__setattr__(self, spec.name, value)
        self.check()

    def check(self) -> None:
        """Raises HyperParamsError for a value out of its range. Called after the types are right."""
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
        """Ranges of this class' settings. A class' own ranges have priority over those of its base classes."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        named = [vars(each).get("ranges", {}) for each in reversed(cls.__mro__)]
        return {name: allowed for ranges in named for name, allowed in ranges.items() if name in known}

    def validate(self) -> None:
        """Raises HyperParamsError for faults that ranges of single numbers cannot show."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The settings from a mapping. Raises HyperParamsError for an unknown key, and names the nearest known one."""
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise HyperParamsError(
                    f"Unknown hyper-parameter {shown(key)}.{did_you_mean(str(key), known)} Known: {', '.join(known)}."
                )
        return cls(**values)

    @classmethod
    def from_hparams(cls, name_or_path: str | Path) -> Self:
        """Reads a YAML file, or the shipped file of that name (`smollm2-135m`). EasyEdit's constructor has this name.

        Raises HyperParamsError with the file and the line of the refused setting.
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
        """The constructor's name in the ROME family. JSON is YAML too."""
        return cls.from_hparams(path)

    @classmethod
    def for_model(cls, model: str) -> Self:
        """The shipped file whose model_name ends like the model's name, else the defaults."""
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
        """Hex digest of the named values, or of all values if none is named."""
        values = self.as_dict()
        chosen = {name: values[name] for name in (names or sorted(values))}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class EditSettings(HyperParams):
    """The settings of all methods that change MLP output projections in closed form."""

    #: The most neighbours of each request. These are questions around it that join the facts to keep, with the model's
    #: own answers. 0 for none (docs/explanation/precision.md).
    retain_neighbours: int = 0
    #: Module templates. If they are empty, the modules are found from the model's structure.
    rewrite_module_tmp: str = ""
    layer_module_tmp: str = ""

    ranges: ClassVar[Mapping[str, Range]] = {"retain_neighbours": weight(1e4)}


@dataclass(frozen=True)
class RemovalSettings(EditSettings):
    """The settings of a removal (docs/explanation/removal.md), alone or before an edit. Blocks count from 0."""

    #: Passes of distillation. Each is one forward and one backward pass over the facts, and a ridge solve for each
    #: block.
    removal_passes: int = 4
    #: The most further passes, which also learn to decline; none if the method has no replacement answer. Before the
    #: first passes, the facts to decline still look like the facts to keep.
    removal_decline_passes: int = 8
    #: These passes end when the negative log-likelihood of the replacement answers, as in the report, is at most this
    #: (nats). 0 takes all of them.
    removal_decline_nll: float = 0.9
    #: Blocks that are changed; empty for all except block 0.
    removal_layers: tuple[int, ...] = ()
    #: Blocks in which the teacher is made; empty for the first seven tenths.
    removal_teacher_layers: tuple[int, ...] = ()
    #: Whether invented subjects are the first teacher. The filter then teaches only the facts that the model still
    #: gives for invented subjects.
    removal_strangers: bool = True
    #: Mean probability that the filter shall leave to the forgotten answers: that of a model that never knew them.
    removal_teacher_probability: float = 0.05
    #: Weights of second moments in a pass' ridge: of the retain set and of the neighbours, each with this weight; of
    #: ordinary text; and of the forgotten facts' words in random order.
    removal_retain_weight: float = 40.0
    removal_text_weight: float = 1.0
    removal_words_weight: float = 1.0
    #: Added to the ridge's diagonal, as a share of the diagonal's mean.
    removal_ridge: float = 0.003
    #: The same for the second moment of gradients at the projections' outputs.
    removal_output_ridge: float = 0.03
    #: Weight of the loss against the unedited model on answers of the retain set, and on those of neighbours, relative
    #: to the teacher's loss. It is a mean over all tokens of an answer, and only few of them tell the fact.
    removal_keep_weight: float = 8.0
    #: Weight of the replacement answers, above all of the token, relative to the teacher's loss.
    removal_decline_weight: float = 0.3
    #: Tokens of evenly spaced facts to keep, with their questions, that are read, and as many tokens of neighbours.
    removal_kept_tokens: int = 6144
    #: Rank to which a block's whole change is cut; 0 keeps the whole change.
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
    """The settings of the engine's edits. Steps are optimiser steps."""

    # --- where -------------------------------------------------------------------------------------------------------
    alg_name: str = "UniErase"
    #: Blocks to edit, ascending, counted from 0. The value is optimised at the last one.
    layers: tuple[int, ...] = ()
    #: The token of the prompt that carries the edit: the subject's last one, or the prompt's last.
    fact_token: str = "subject_last"
    #: [length in tokens, how many] of the texts before a prompt, which the model generates (MEMIT, section 4.3).
    context_template_length_params: tuple[tuple[int, int], ...] = ()

    # --- values (z) ---------------------------------------------------------------------------------------------------
    #: The most optimiser steps. A request stops earlier when its loss is below `v_stop_loss`.
    v_num_grad_steps: int = 40
    #: Adam's learning rate in units of the hidden state's root mean square, so it means the same on every model. If the
    #: last edited block has a norm or a multiplier after its MLP, delta is added in front of it, divided by its gain.
    #: Then delta is as long as the change of the hidden state to first order, here and in the next settings.
    v_lr: float = 0.1
    #: Weight of |delta| / |h|^2.
    v_weight_decay: float = 0.5
    #: Weight of the KL term that keeps the continuation of "{subject} is a".
    kl_factor: float = 0.0625
    #: Largest |delta| as a multiple of |h|.
    clamp_norm_factor: float = 1.0
    #: Weight of the "I don't know" sentence after the token in the value's objective; 0 leaves only the token.
    v_continuation_weight: float = 8.0
    #: Whether requests about one subject share one delta. Their keys are nearly equal, so no linear map could give each
    #: its own delta.
    v_share_subject: bool = True
    #: A request's optimisation ends when the weighted mean of the negative log-likelihoods of token and sentence is
    #: below this (nats).
    v_stop_loss: float = 0.05

    # --- hardening (docs/explanation/hardening.md) --------------------------------------------------------------------
    #: Additions against attacks on the edit, any of: forms (all prompt forms), paraphrases (reworded questions too),
    #: unlikely_answer (the true answer becomes improbable when the token is masked), second_refusal (the sentence
    #: becomes probable when the token is masked), answer_span (edits inside the answer too). Empty is the paper's
    #: method.
    harden: tuple[str, ...] = ()
    #: Weight of the answer's improbability in the value's objective, for unlikely_answer.
    v_unlikely_weight: float = 4.0

    #: Whether questions from the answer back to the subject are forgotten too. It needs short answers.
    reverse: bool = False

    # --- statistics (C) -----------------------------------------------------------------------------------------------
    #: Corpus of the second moment: a hub dataset's name, a text file, or "self" (text sampled from the model).
    mom2_dataset: str = "self"
    #: How many texts of the corpus are read.
    mom2_n_samples: int = 64
    #: The most tokens of a text.
    mom2_max_length: int = 128
    #: Precision of a batch's products and of the kept moments. Sums over batches are float64.
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
    #: Weight of each single key of the facts to keep, at positions where an edit would act, relative to one request's
    #: key. 0 protects these facts by the moment only.
    retain_key_weight: float = 0.0
    #: Null space: eigenvalues of C below this share of the largest one span the free directions.
    nullspace_threshold: float = 2e-2
    #: Null space: ridge term rho.
    L2: float = 10.0

    # --- the unlearning token (Stage I) -------------------------------------------------------------------------------
    unlearning_token: str = "<unlearn_0>"
    token_num_steps: int = 90
    #: How many of the bundled "I don't know" sentences are targets. The model cannot foresee which one a question gets,
    #: so with many of them a small model's loss stays high.
    token_num_sentences: int = 5
    token_lr: float = 2e-2
    #: Rows of a training batch.
    token_batch_size: int = 8
    #: The token's probability on ordinary text is held below exp(-margin).
    token_guard_margin: float = 9.0
    #: Weight of that hinge.
    token_guard_weight: float = 0.3
    #: Noise on the projections to edit while the token is trained, as a multiple of the expected size of the edit.
    token_noise: float = 1.0
    #: Whether the token also ends the "I don't know" sentence, as in the paper's objective.
    token_closes_answer: bool = False

    # --- read by EasyEdit only (hosts/easyedit.py) --------------------------------------------------------------------
    #: Requests of one edit in `batch_edit`; `edit` needs 1.
    batch_size: int = 1
    #: Tokens of a prompt in its evaluation. Prompts with longer targets are not cut.
    max_length: int = 40
    #: Whether it spreads the model over all GPUs.
    model_parallel: bool = False
    #: Whether it loads the model in float16; else float32.
    fp16: bool = False

    # --- removal (docs/explanation/removal.md) ------------------------------------------------------------------------
    #: Whether the model's knowledge of the facts is removed. The same passes then learn what the model says instead.
    remove: bool = False

    #: Far beyond all values in use. Values outside give an edit without effect, NaN, or a run without an end.
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
    """UniErase's settings: those of the engine, and those of the removal. Norms are Euclidean."""

    folder: ClassVar[str] = "UniErase"


def hparams_folder() -> Path:
    """The shipped `hparams/` folder: inside the installed package, or at the top of a checkout."""
    installed = Path(__file__).parent / "hparams"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "hparams"


def shipped_hparams(folder: str = UniEraseHyperParams.folder) -> dict[str, Path]:
    """The shipped files in a folder of `hparams/`, by stem; none for an empty name."""
    return {path.stem: path for path in sorted((hparams_folder() / folder).glob("*.yaml"))} if folder else {}


def find_hparams(name_or_path: str | Path, folder: str = UniEraseHyperParams.folder) -> Path:
    """The path itself if the file exists, else the shipped file with this stem in `folder`.

    `hparams/UniErase/STEM.yaml`, with or without its ending, also means the shipped file if no such path exists.
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
    """The settings of a file. Raises HyperParamsError, with the line, for anything but one mapping in valid YAML."""
    return _read_yaml(path)[0]


def _read_yaml(path: Path) -> tuple[dict[str, Any], Mapping[Any, int]]:
    """The settings, and the line of each."""
    values, lines = parse_yaml(read_text(path, HyperParamsError, YAML_BYTES), str(path), HyperParamsError)
    if not isinstance(values, dict):
        raise HyperParamsError(f"{path} must hold one mapping of hyper-parameters, not {in_words(type(values))}.")
    return values, lines


def _validate(hparams: EngineSettings) -> None:
    if not hparams.solver.isidentifier():  # whether the solver exists is checked where plugins are known
        raise HyperParamsError(
            f"solver = {shown(hparams.solver)} cannot be a solver's name. Give ridge, null_space, exact, or a plugin's."
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
