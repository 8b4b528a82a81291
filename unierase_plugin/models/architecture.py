"""Finds the parts of a causal language model that an edit needs. It looks at the modules, never at the model's name.

The decoder is the longest list of similar blocks. A block's MLP output projection is its last linear map back to the
hidden size that has an expansion beside it. Two tokens sent through the model confirm the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, shown
from .earlier import accepts_position_ids, reads_left_padding
from .quantised import method_of
from .tying import is_tied
from .wrapping import refuse_wrapped


class Weighted(nn.Module):
    """What embeddings, heads and projections have in common, for type checkers. It has no instances."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Architecture:
    """The parts of one model. Layers count from 0; d is the hidden size, m the MLP's inner width, V the vocabulary."""

    model: Any
    blocks: tuple[nn.Module, ...]
    #: Names of the MLP output projections within the model, one for each block; "" for a block without one.
    projection_names: tuple[str, ...]
    #: None for a block without one: `check_layers` refuses it.
    projections: tuple[Weighted, ...]
    embedding: Weighted
    head: Weighted
    #: Whether one matrix is both embedding and LM head.
    tied: bool
    #: Whether blocks return (hidden, ...) instead of the hidden states alone.
    blocks_return_tuple: bool
    accepts_position_ids: bool

    @property
    def hidden_size(self) -> int:
        return self.embedding.weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, including padding rows."""
        return self.embedding.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where token ids enter."""
        return self.embedding.weight.device

    @cached_property
    def earlier(self) -> str:
        """What of earlier tokens a pass can go on from: a key of `prefix.KINDS`. It is tried at the first use."""
        from .prefix import kind_that_fits

        return kind_that_fits(self)

    @cached_property
    def pads_left(self) -> bool:
        """Whether texts may be padded on the left. It is tried at the first use."""
        return reads_left_padding(self.model)

    @property
    def editable(self) -> tuple[int, ...]:
        """The blocks that have an MLP output projection, ascending."""
        return tuple(layer for layer, name in enumerate(self.projection_names) if name)

    def mlp_width(self, layer: int) -> int:
        projection = self.projections[layer]
        return projection.weight.shape[0 if stores_input_first(projection) else 1]

    def weight_name(self, layer: int) -> str:
        return self.projection_names[layer] + ".weight"

    def check_layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The layers as given. Raises ArchitectureError for blocks that the model lacks, or that lack an MLP."""
        check_blocks(layers, len(self.blocks))
        bare = [layer for layer in layers if layer not in self.editable]
        if bare:
            raise ArchitectureError(
                f"layers = {shown(list(layers))}: block {', '.join(map(str, bare))} of this model has no MLP output "
                f"projection to edit. Choose from {', '.join(map(str, self.editable))}."
            )
        return tuple(layers)


def check_blocks(layers: Sequence[int], blocks: int, setting: str = "layers") -> tuple[int, ...]:
    """The layers as given. Raises ArchitectureError for layers that a model with this many blocks does not have."""
    missing = [layer for layer in layers if not 0 <= layer < blocks]
    if missing:
        raise ArchitectureError(
            f"{setting} = {shown(list(layers))}: the model has {blocks} blocks, numbered 0 to {blocks - 1}; there is "
            f"no block {', '.join(map(str, missing))}."
        )
    return tuple(layers)


def stores_input_first(projection: nn.Module) -> bool:
    """True for `Conv1D`, whose weight is (in, out); `nn.Linear` stores (out, in)."""
    return not isinstance(projection, nn.Linear)


def find_architecture(model: Any, rewrite_module_tmp: str = "", layer_module_tmp: str = "") -> Architecture:
    """Finds the model's parts. Templates such as "model.layers.{}.mlp.down_proj" replace the search.

    Blocks may be unlike one another: not all of them need an MLP, or a module that a template names.

    Raises ArchitectureError for encoders, sequence-to-sequence and mixture-of-experts models, quantised weights, and
    models whose blocks or projections cannot be identified.
    """
    refuse_unfit(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    block_names = _block_names(model, layer_module_tmp)
    blocks = tuple(model.get_submodule(name) for name in block_names)
    hidden_size = embedding.weight.shape[1]
    # First, so that an encoder is reported as one, whatever its projections look like.
    blocks_return_tuple = _probe(model, blocks[0])
    if rewrite_module_tmp:
        names = _filled(model, rewrite_module_tmp, len(blocks))
    else:
        names = _projection_names(dict(zip(block_names, blocks, strict=True)), hidden_size)
    projections = tuple(model.get_submodule(name) if name else None for name in names)
    for name, projection in zip(names, projections, strict=True):
        if projection is not None:
            _check_weight(name, projection, hidden_size)
    _refuse_shared(names, projections)
    return Architecture(
        model=model,
        blocks=blocks,
        projection_names=names,
        projections=cast("tuple[Weighted, ...]", projections),
        embedding=embedding,
        head=head,
        tied=is_tied(model),
        blocks_return_tuple=blocks_return_tuple,
        accepts_position_ids=accepts_position_ids(model),
    )


def refuse_unfit(model: Any) -> None:
    """Raises ArchitectureError for anything but a causal language model in plain weights."""
    refuse_wrapped(model)
    config = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ArchitectureError(f"{kind} is not a Hugging Face model. Give an AutoModelForCausalLM.")
    if getattr(config, "is_encoder_decoder", False):
        raise ArchitectureError(f"{kind} is a sequence-to-sequence model. UniErase edits decoder-only language models.")
    if getattr(config, "quantization_config", None) is not None:
        raise ArchitectureError(
            f"{kind} has quantised weights ({method_of(config.quantization_config)}), which a closed-form edit "
            "cannot change. Load the original bf16, fp16 or fp32 weights, edit them, and quantise the result."
        )
    if getattr(model, "_tp_plan", None) and getattr(model, "tp_size", None) not in (None, 1):
        raise ArchitectureError(
            f"{kind} is loaded tensor-parallel over {model.tp_size} processes. Load it with device_map='auto' instead."
        )
    if model.get_output_embeddings() is None:
        raise ArchitectureError(f"{kind} has no language-model head. Load it with AutoModelForCausalLM.")


def _fill(model: nn.Module, template: str, index: int) -> str:
    if "{}" not in template:
        raise ArchitectureError(
            f"The template {shown(template)} has no place for the block's number. Write it as {{}}, for example "
            "'model.layers.{}.mlp.down_proj'."
        )
    name = template.format(index)
    try:
        model.get_submodule(name)
    except AttributeError:
        raise ArchitectureError(
            f"The template {shown(template)} names no module of {type(model).__name__}: there is no {name!r}. "
            "Leave the template out to have the module found."
        ) from None
    return name


def _filled(model: nn.Module, template: str, blocks: int) -> tuple[str, ...]:
    """The template's module of each block; "" for a block that has none, if others have one."""
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    names = tuple(template.format(index) if template.format(index) in present else "" for index in range(blocks))
    if not any(names) or "{}" not in template:
        _fill(model, template, 0)
    return names


def _refuse_shared(names: Sequence[str], projections: Sequence[nn.Module | None]) -> None:
    """Raises ArchitectureError if one projection serves several blocks."""
    owner: dict[int, str] = {}
    for name, projection in zip(names, projections, strict=True):
        if projection is None:
            continue
        other = owner.setdefault(id(projection.weight), name)
        if other != name:
            raise ArchitectureError(
                f"{other} and {name} are one weight that serves several blocks: an edit at one block would act at all "
                "of them. Set rewrite_module_tmp to projections that each block has for itself."
            )


def _block_names(model: Any, template: str) -> list[str]:
    """The blocks' names in order: the longest list of modules of one class that have linear maps."""
    if template:
        first = _fill(model, template, 0)
        parent = first.rsplit(".", 1)[0]
        return [f"{parent}.{index}" for index in range(len(model.get_submodule(parent)))]
    lists = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(_linear_maps(module[0]))
    ]
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    fitting = [entry for entry in lists if entry[0] == expected] or lists
    if not fitting:
        raise ArchitectureError(
            f"No list of decoder blocks was found in {type(model).__name__}. Set layer_module_tmp, for example "
            "'model.layers.{}'."
        )
    length, name = max(fitting, key=lambda entry: (entry[0], -len(entry[1])))
    return [f"{name}.{index}" for index in range(length)]


def _linear_maps(block: nn.Module) -> Iterator[tuple[str, nn.Module, int, int]]:
    """(name, module, in, out) of every linear map of a block, in order of registration."""
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            rows, columns = weight.shape
            yield (name, module, rows, columns) if stores_input_first(module) else (name, module, columns, rows)


def _projection_names(blocks: Mapping[str, nn.Module], hidden_size: int) -> tuple[str, ...]:
    """The projection of each block; "" for a block without one. Raises ArchitectureError if no block has one."""
    times = Counter(id(weight) for block in blocks.values() for weight in block.parameters())
    shared = {weight for weight, count in times.items() if count > 1}
    found = {name: _output_projection(name, block, hidden_size, shared) for name, block in blocks.items()}
    if not any(found.values()):
        name, block = next(iter(blocks.items()))
        several = " Weights that serve several blocks do not count: an edit of one would act at all of them."
        raise ArchitectureError(
            f"No MLP output projection was found in block {name!r} (linear maps: "
            f"{', '.join(each for each, *_ in _linear_maps(block))}), nor in another block.{several if shared else ''} "
            "Set rewrite_module_tmp, for example 'model.layers.{}.mlp.down_proj'."
        )
    return tuple(f"{name}.{each}" if each else "" for name, each in found.items())


def _output_projection(block_name: str, block: nn.Module, hidden_size: int, shared: AbstractSet[int]) -> str:
    """The projection's name within a block, or "". Raises ArchitectureError for a mixture of experts.

    shared: the ids of weights that several blocks share. They are passed over.
    """
    experts = _experts(block, hidden_size, shared)
    if experts:
        raise ArchitectureError(
            f"Block {block_name!r} holds several MLPs in {experts!r}: mixture-of-experts models are not supported, "
            "since a fact's key is spread over experts. Set rewrite_module_tmp to choose one projection by hand."
        )
    maps = [each for each in _linear_maps(block) if id(each[1].weight) not in shared]
    found = []
    for name, _, width, out in maps:
        if out != hidden_size:
            continue
        parent = name.rpartition(".")[0]
        readers = [
            o for other, _, i, o in maps if other != name and other.rpartition(".")[0] == parent and i == hidden_size
        ]
        # Queries, keys and values are three readers. A gated MLP has two, or one of twice the width.
        if len(readers) in (1, 2) and readers[-1] in (width, 2 * width):
            found.append(name)
    if not found:
        return ""
    # Gemma 4 has a second, narrow one for its inputs of each layer.
    wide = [name for name, _, width, _ in maps if name in found and width >= hidden_size]
    return (wide or found)[-1]


def _experts(block: nn.Module, hidden_size: int, shared: AbstractSet[int]) -> str:
    """Name of a list of MLPs, or of weights stacked over experts, in a block; "" if the block has one MLP."""
    routed = {size for _, _, *sizes in _linear_maps(block) for size in sizes}
    for name, module in block.named_modules():
        if {id(weight) for weight in module.parameters()} <= shared:
            continue
        listed = isinstance(module, nn.ModuleList) and len(module) > 1 and any(_linear_maps(module[0]))
        # A convolution's kernel has three axes as well, and so have the heads of some recurrent blocks: no router
        # chooses between those.
        own = () if isinstance(module, nn.Conv1d) else module.parameters(recurse=False)
        stacked = any(weight.ndim == 3 and weight.shape[0] in routed for weight in own)
        # DBRX puts the matrices of all experts side by side.
        wide = [w for w in module.parameters(recurse=False) if w.ndim == 2 and min(w.shape) == hidden_size]
        joined = len(wide) > 1
        if listed or stacked or joined:
            return str(name)
    return ""


def _check_weight(name: str, projection: nn.Module, hidden_size: int) -> None:
    weight = getattr(projection, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.ndim != 2
        or not weight.dtype.is_floating_point
        or weight.element_size() < 2
    ):
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise ArchitectureError(
            f"{name}.weight is {kind}: a closed-form edit needs a plain matrix in bf16, fp16 or fp32. "
            "Load the model without quantisation."
        )
    out = weight.shape[1 if stores_input_first(projection) else 0]
    if out != hidden_size:
        raise ArchitectureError(
            f"{name} gives vectors of size {out}, not the hidden size {hidden_size}: it is no MLP output projection. "
            "Leave rewrite_module_tmp out to have it found."
        )


def _probe(model: Any, block: nn.Module) -> bool:
    """Whether blocks return tuples. Refuses a model whose first position sees the second one (an encoder)."""
    seen: list[bool] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(isinstance(output, tuple)))
    was_training = model.training
    device = model.get_input_embeddings().weight.device
    try:
        model.eval()
        with torch.no_grad():
            logits = model(torch.tensor([[1, 1], [1, 2]], device=device), use_cache=False).logits[:, 0]
    finally:
        handle.remove()
        model.train(was_training)
    # A model with NaN in its weights gives NaN at both. Another check reports that.
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ArchitectureError(
            f"{type(model).__name__} looks at later tokens: it is an encoder. UniErase edits causal language models."
        )
    return seen[0]
