"""What a training changes: the weights themselves, or a LoRA adapter on them. Both can be put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import DependencyError
from ...models.architecture import Architecture
from ...models.weights import OriginalWeights


class TrainedWeights:
    """The weights that are trained, in float32 whatever their dtype: bfloat16 would lose steps of 1e-5."""

    def __init__(self, arch: Architecture, names: Sequence[str], hparams: Any) -> None:
        self.arch, self.names, self.hparams = arch, list(names), hparams
        self.originals = OriginalWeights(())
        self.dtypes: dict[str, torch.dtype] = {}
        self.trains_head = any(arch.model.get_parameter(name) is arch.head.weight for name in self.names)

    @property
    def count(self) -> int:
        return sum(self.arch.model.get_parameter(name).numel() for name in self.names)

    def open(self) -> Any:
        """Makes the weights trainable. Returns the network for `Trainer`; its outputs are as before."""
        self._keep()
        for name in self.names:
            parameter = self.arch.model.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return self.arch.model

    def close(self) -> None:
        """Ends the training: the model keeps what it learned, and nothing else of the training is left on it."""
        self.arch.model.requires_grad_(False)
        for name, dtype in self.dtypes.items():
            parameter = self.arch.model.get_parameter(name)
            parameter.data, parameter.grad = parameter.data.to(dtype), None

    def undo(self) -> None:
        """Puts the weights back as they were, to the bit."""
        self.close()
        self.originals.restore()

    def _keep(self) -> None:
        parameters = {name: self.arch.model.get_parameter(name) for name in self.names}
        # On the CPU: the device holds the optimiser's state beside the weights.
        self.originals = OriginalWeights(parameters.values(), device="cpu")
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}


class TrainedAdapter(TrainedWeights):
    """A LoRA adapter on the linear maps within the blocks. Their own weights stay until it is merged."""

    def __init__(self, arch: Architecture, names: Sequence[str], hparams: Any) -> None:
        chosen = {id(arch.model.get_parameter(name)) for name in names}
        inside = {id(module) for block in arch.blocks for module in block.modules()}
        self.targets = [
            name
            for name, module in arch.model.named_modules()
            if id(module) in inside and _is_linear(module) and id(module.weight) in chosen
        ]
        super().__init__(arch, [f"{name}.weight" for name in self.targets], hparams)
        self.network: Any = None

    def open(self) -> Any:
        h, peft = self.hparams, import_peft()
        self._keep()
        settings = peft.LoraConfig(
            r=h.lora_rank,
            lora_alpha=h.lora_alpha,
            lora_dropout=h.lora_dropout,
            target_modules=self.targets,
            fan_in_fan_out=not isinstance(self.arch.model.get_submodule(self.targets[0]), torch.nn.Linear),
        )
        self.network = peft.get_peft_model(self.arch.model, settings)
        # With a name, saving the adapter would ask the hub for the base model's vocabulary.
        settings.base_model_name_or_path = None
        return self.network

    def close(self) -> None:
        self._end("merge_and_unload")
        super().close()

    def undo(self) -> None:
        self._end("unload")
        super().undo()

    def _end(self, how: str) -> None:
        if self.network is None:
            return
        network, self.network = self.network, None
        getattr(network, how)()
        # peft 0.18 leaves its settings on the model.
        vars(self.arch.model).pop("peft_config", None)


def _is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def import_peft() -> Any:
    """The package peft. Raises DependencyError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise DependencyError(
            "lora_rank asks for an adapter, which needs the package peft: pip install 'unierase-plugin[peft]'. "
            "With lora_rank: 0 the weights themselves are trained."
        ) from error
    return peft
