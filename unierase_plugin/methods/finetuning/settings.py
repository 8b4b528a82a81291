"""Settings of the methods that fine-tune: the shared ones, and those of each method. Defaults are published values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ...hparams import LAYERS, HyperParams
from ...settings.ranges import Range, positive, weight


@dataclass(frozen=True)
class TrainingHyperParams(HyperParams):
    """Shared settings: the schedule of Yuan et al. 2024 (arXiv 2410.08109), which goes back to TOFU's own code."""

    # --- objective ----------------------------------------------------------------------------------------------------
    #: Weight of the term on the forget set.
    forget_weight: float = 1.0
    #: Weight of the term on the retain set; 0 leaves it out.
    retain_weight: float = 1.0

    # --- schedule -----------------------------------------------------------------------------------------------------
    #: Learning rate of AdamW after the warm-up. It falls linearly to 0.
    learning_rate: float = 1e-5
    #: Passes over the forget set.
    epochs: float = 5.0
    #: Pairs (one fact to forget, one to keep) in an optimiser step, at most those of an epoch. A batch that the memory
    #: does not hold is split, and the gradients are added up.
    batch_size: int = 32
    #: Epochs in which the learning rate grows linearly from 0.
    warmup_epochs: float = 1.0
    weight_decay: float = 0.01
    #: Norm that gradients are clipped to.
    max_grad_norm: float = 1.0

    # --- weights ------------------------------------------------------------------------------------------------------
    #: Rank of a LoRA adapter, which is merged at the end; 0 trains the weights themselves.
    lora_rank: int = 0
    #: The adapter's product is scaled by lora_alpha / lora_rank.
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    #: Computes the activations of a block again in the backward pass: less memory, about a third more time.
    gradient_checkpointing: bool = False

    #: learning_rate and max_grad_norm have no upper limit: training that diverges ends with an error.
    ranges: ClassVar[Mapping[str, Range]] = {
        "forget_weight": positive(1e9),
        "retain_weight": weight(1e9),
        "learning_rate": positive(),
        "epochs": positive(1e5),
        "batch_size": positive(1e9),
        "warmup_epochs": weight(1e5),
        "weight_decay": weight(1e3),
        "max_grad_norm": positive(),
        "lora_rank": weight(1e6),
        "lora_alpha": positive(1e6),
        "lora_dropout": Range(0, 1, below=True),
    }


@dataclass(frozen=True)
class FineTuneHyperParams(TrainingHyperParams):
    """Learning facts: TOFU's target models, and reference models that never saw the forget set (arXiv 2401.06121)."""

    folder: ClassVar[str] = "FineTune"
    retain_weight: float = 0.0


@dataclass(frozen=True)
class AscentGDHyperParams(TrainingHyperParams):
    """Settings of Yuan et al. 2024 (arXiv 2410.08109) for gradient ascent with descent on the retain set."""

    folder: ClassVar[str] = "GA_GD"


@dataclass(frozen=True)
class AscentKLHyperParams(TrainingHyperParams):
    """Settings of Yuan et al. 2024 (arXiv 2410.08109) for gradient ascent with KL on the retain set."""

    folder: ClassVar[str] = "GA_KL"


@dataclass(frozen=True)
class PreferenceHyperParams(TrainingHyperParams):
    """Shared by the methods that compare likelihoods."""

    #: How fast the gradient on a fact fades as its likelihood falls. At 0 it would never fade.
    beta: float = 0.1

    ranges: ClassVar[Mapping[str, Range]] = {"beta": positive(1e6)}


@dataclass(frozen=True)
class NPOGDHyperParams(PreferenceHyperParams):
    """Settings for NPO with descent on the retain set: beta of Zhang et al. 2024 (arXiv 2404.05868)."""

    folder: ClassVar[str] = "NPO_GD"


@dataclass(frozen=True)
class NPOKLHyperParams(PreferenceHyperParams):
    """Settings for NPO with KL on the retain set: beta of Zhang et al. 2024 (arXiv 2404.05868)."""

    folder: ClassVar[str] = "NPO_KL"


@dataclass(frozen=True)
class DPOGDHyperParams(PreferenceHyperParams):
    """Settings for DPO with descent on the retain set: beta of Zhang et al. 2024 (arXiv 2404.05868)."""

    folder: ClassVar[str] = "DPO_GD"


@dataclass(frozen=True)
class DPOKLHyperParams(PreferenceHyperParams):
    """Settings for DPO with KL on the retain set: beta of Zhang et al. 2024 (arXiv 2404.05868)."""

    folder: ClassVar[str] = "DPO_KL"


@dataclass(frozen=True)
class IDKAPHyperParams(PreferenceHyperParams):
    """Settings of Yuan et al. 2024 (arXiv 2410.08109) for IDK with answer preservation."""

    folder: ClassVar[str] = "IDK_AP"


@dataclass(frozen=True)
class MEGDHyperParams(TrainingHyperParams):
    """Settings of Yuan et al. 2024 for maximum entropy."""

    folder: ClassVar[str] = "ME_GD"
    forget_weight: float = 0.1
    #: Whether predictions of the question's tokens are made uniform too, as in the authors' code.
    whole_text: bool = True


@dataclass(frozen=True)
class SimNPOHyperParams(PreferenceHyperParams):
    """Settings of Fan et al. 2024 (arXiv 2410.07163) for TOFU."""

    folder: ClassVar[str] = "SimNPO"
    forget_weight: float = 0.125
    epochs: float = 10.0
    beta: float = 4.5
    #: gamma: the mean log-likelihood must fall below this, in units of 1/beta.
    margin: float = 0.0

    ranges: ClassVar[Mapping[str, Range]] = {"margin": weight(1e6)}


@dataclass(frozen=True)
class UNDIALHyperParams(TrainingHyperParams):
    """Settings that open-unlearning has for UNDIAL (Dong et al. 2024, arXiv 2402.10052)."""

    folder: ClassVar[str] = "UNDIAL"
    retain_weight: float = 0.0
    learning_rate: float = 1e-4
    epochs: float = 10.0
    #: How far the logit of the memorised token is lowered in the predictions that the model learns to imitate.
    strength: float = 10.0

    ranges: ClassVar[Mapping[str, Range]] = {"strength": positive(1e6)}


@dataclass(frozen=True)
class RMUHyperParams(TrainingHyperParams):
    """Settings of Li et al. 2024 (arXiv 2403.03218) for Zephyr-7B, epochs and batch in the terms used here."""

    folder: ClassVar[str] = "RMU"
    retain_weight: float = 1200.0
    learning_rate: float = 5e-5
    batch_size: int = 4
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    #: Block whose output is steered, counted from 0; -1 takes the one at 7/32 of the depth.
    layer: int = -1
    #: c: length of the vector that the states of the forget set are steered to.
    steering: float = 6.5

    ranges: ClassVar[Mapping[str, Range]] = {"layer": LAYERS, "steering": positive(1e9)}
