"""Finds the parts of a causal language model that an edit needs. It looks at the modules, never at the model's name.

The decoder is the longest list of similar blocks. A block's MLP output projection is its last linear map back to the
hidden size that has an expansion beside it, or the stacked down projections of its routed experts (`experts`). Two
tokens sent through the model confirm the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, reason, shown
from .earlier import accepts_position_ids, reads_left_padding
from .experts import Experts, alike, argument_order, arguments, find_experts, stacked_modules
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
    #: Names of the MLP output projections, or of the modules of routed experts, within the model, one for each block;
    #: "" for a block without one.
    projection_names: tuple[str, ...]
    #: None for a block without one: `check_layers` refuses it.
    projections: tuple[Weighted | Experts, ...]
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
        if isinstance(projection, Experts):
            return projection.width
        return projection.weight.shape[0 if stores_input_first(projection) else 1]

    def weight_name(self, layer: int) -> str:
        projection = self.projections[layer]
        return projection.weight_name if isinstance(projection, Experts) else self.projection_names[layer] + ".weight"

    def moment_shape(self, layer: int) -> tuple[int, ...]:
        """The shape of a second moment of keys: (m, m), or (E, I, I) for E experts of inner width I."""
        projection = self.projections[layer]
        if isinstance(projection, Experts):
            return (projection.count, projection.inner, projection.inner)
        return (self.mlp_width(layer),) * 2

    def projection_module(self, layer: int) -> nn.Module:
        """The module whose output is that of the projection, or of all routed experts together."""
        projection = self.projections[layer]
        return projection.module if isinstance(projection, Experts) else projection

    def matrix(self, layer: int) -> Tensor:
        """The weight (d, m) of the block's projection, in either layout; of all experts side by side."""
        projection = self.projections[layer]
        if isinstance(projection, Experts):
            return projection.matrix()
        weight = projection.weight.detach()
        return weight.T if stores_input_first(projection) else weight

    def dense(self, layer: int) -> Weighted:
        """The block's projection. Raises ArchitectureError if it is a mixture of experts."""
        projection = self.projections[layer]
        if isinstance(projection, Experts):
            raise ArchitectureError(
                f"Block {layer} is a mixture of experts ({projection.name!r}), which is edited but not trained or "
                "filtered as one matrix. Name blocks without experts, or use a method that edits: unierase, memit, "
                "alphaedit or rome."
            )
        return projection

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


def stores_input_first(projection: nn.Module | Experts) -> bool:
    """True for `Conv1D`, whose weight is (in, out); `nn.Linear` stores (out, in). Experts have either, by expert."""
    return projection.input_first if isinstance(projection, Experts) else not isinstance(projection, nn.Linear)


def find_architecture(model: Any, rewrite_module_tmp: str = "", layer_module_tmp: str = "") -> Architecture:
    """Finds the model's parts. Templates such as "model.layers.{}.mlp.down_proj" replace the search.

    Blocks may be unlike one another: not all of them need an MLP, or a module that a template names.

    Raises ArchitectureError for encoders, sequence-to-sequence models, quantised weights, and models whose blocks,
    projections or experts cannot be identified.
    """
    refuse_unfit(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    block_names = _block_names(model, layer_module_tmp)
    blocks = tuple(model.get_submodule(name) for name in block_names)
    hidden_size = embedding.weight.shape[1]
    # First, so that an encoder is reported as one, whatever its projections look like.
    stacked = {
        f"{block_name}.{name}": module
        for block_name, block in zip(block_names, blocks, strict=True)
        for name, module in stacked_modules(block)
    }
    square = {
        f"{name}.{each}": module
        for name, block in zip(block_names, blocks, strict=True)
        for each, module, width, out in _linear_maps(block)
        if width == out == hidden_size
    }
    blocks_return_tuple, calls = _probe(model, blocks[0], {**stacked, **square})
    if rewrite_module_tmp:
        names = _filled(model, rewrite_module_tmp, len(blocks))
    else:
        names = _projection_names(dict(zip(block_names, blocks, strict=True)), hidden_size, calls)
    projections = _projections(model, names, stacked, calls, hidden_size)
    _refuse_shared(names, projections)
    return Architecture(
        model=model,
        blocks=blocks,
        projection_names=names,
        projections=projections,
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


def _projections(
    model: nn.Module,
    names: Sequence[str],
    stacked: Mapping[str, nn.Module],
    calls: Mapping[str, list[Any]],
    hidden_size: int,
) -> tuple[Any, ...]:
    """The projections or experts of these names, checked; None for "". Experts of one class and shape: tried once."""
    found: list[Any] = []
    known: Experts | None = None
    for name in names:
        if name in stacked:
            if name not in calls:
                raise ArchitectureError(f"The experts {name!r} do not take part in the model's forward pass.")
            again = alike(known, name, stacked[name]) if known else None
            known = again or find_experts(name, stacked[name], calls[name], hidden_size)
            found.append(known)
        elif name:
            projection = model.get_submodule(name)
            _check_weight(name, projection, hidden_size)
            found.append(projection)
        else:
            found.append(None)
    return tuple(found)


def _projection_names(
    blocks: Mapping[str, nn.Module], hidden_size: int, calls: Mapping[str, list[Any]]
) -> tuple[str, ...]:
    """The projection of each block; "" for a block without one. Raises ArchitectureError if no block has one."""
    times = Counter(id(weight) for block in blocks.values() for weight in block.parameters())
    shared = {weight for weight, count in times.items() if count > 1}
    found = {name: _output_projection(name, block, hidden_size, shared, calls) for name, block in blocks.items()}
    if not any(found.values()):
        name, block = next(iter(blocks.items()))
        if hidden_size not in {width for _, _, width, _ in _linear_maps(block)}:
            raise ArchitectureError(
                f"The embedding gives vectors of size {hidden_size}, which no linear map of block {name!r} reads: the "
                "blocks work at another width, and a map before them changes it. UniErase edits models whose "
                "embedding, blocks and head have one width."
            )
        # Any linear map back to the hidden size can be edited.
        back = [each for each, _, _, out in _linear_maps(block) if out == hidden_size]
        example = back[-1] if back else "mlp.down_proj"
        several = " Weights that serve several blocks do not count: an edit of one would act at all of them."
        raise ArchitectureError(
            f"No MLP output projection was found in block {name!r} (linear maps: "
            f"{', '.join(each for each, *_ in _linear_maps(block))}), nor in another block.{several if shared else ''} "
            f"Set rewrite_module_tmp, for example {name.rpartition('.')[0] + '.{}.' + example!r}."
        )
    return tuple(f"{name}.{each}" if each else "" for name, each in found.items())


def _output_projection(
    block_name: str, block: nn.Module, hidden_size: int, shared: AbstractSet[int], calls: Mapping[str, list[Any]]
) -> str:
    """The name within a block of its projection or of its routed experts, or "".

    shared: the ids of weights that several blocks share. They are passed over.
    """
    routed = [
        name for name, _ in stacked_modules(block) if argument_order(calls.get(f"{block_name}.{name}", [])) is not None
    ]
    if len(routed) == 1:
        return routed[0]
    experts = ", ".join(routed) or _experts(block, hidden_size, shared)
    if experts:
        raise ArchitectureError(
            f"Block {block_name!r} holds several MLPs in {experts!r}, and not as one module of routed experts: stacked "
            "weights, called with each token's experts and the router's weights. Load the model with transformers 5 or "
            "later and without trust_remote_code, which stacks the experts of most families, or set rewrite_module_tmp "
            "to choose one projection by hand."
        )
    maps = [each for each in _linear_maps(block) if id(each[1].weight) not in shared]
    found = []
    for name, _, width, out in maps:
        if out != hidden_size:
            continue
        parent = name.rpartition(".")[0]
        readers = {
            other: o
            for other, _, i, o in maps
            if other != name and other.rpartition(".")[0] == parent and i == hidden_size
        }
        # Queries, keys and values are three readers. A gated MLP has two, or one of twice the width.
        if len(readers) not in (1, 2) or [*readers.values()][-1] not in (width, 2 * width):
            continue
        # Where their output map lies elsewhere (GIT), values have two readers. They read the same input as these.
        inputs = [calls.get(f"{block_name}.{each}") for each in (name, *readers)]
        if not (inputs[0] and any(each and _equal(each[0], inputs[0][0]) for each in inputs[1:])):
            found.append(name)
    if not found:
        return ""
    # Gemma 4 has a second, narrow one for its inputs of each layer.
    wide = [name for name, _, width, _ in maps if name in found and width >= hidden_size]
    return (wide or found)[-1]


def _equal(one: Any, other: Any) -> bool:
    return (
        isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    )


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
        # A router has an output for each expert, and maybe some more.
        stacked = any(w.ndim == 3 and any(len(w) <= size <= 2 * len(w) for size in routed) for w in own)
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


def _probe(model: Any, block: nn.Module, watched: Mapping[str, nn.Module]) -> tuple[bool, dict[str, list[Any]]]:
    """Whether blocks return tuples, and the arguments of the watched modules' calls.

    Refuses a model whose first position sees the second one (an encoder).
    """
    seen: list[bool] = []
    calls: dict[str, list[Any]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] = arguments(module, args, kwargs)

    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(isinstance(output, (tuple, list)))),
        *(module.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, module in watched.items()),
    ]
    was_training = model.training
    device = model.get_input_embeddings().weight.device
    try:
        model.eval()
        with torch.no_grad():
            logits = model(torch.tensor([[1, 1], [1, 2]], device=device), use_cache=False).logits[:, 0]
    except Exception as error:  # whatever a model's own code raises
        raise ArchitectureError(
            f"{type(model).__name__} does not run on two tokens: {type(error).__name__}: {reason(error)}. UniErase "
            "edits models that give logits for token ids alone. Check the model's config and weights."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    # A model with NaN in its weights gives NaN at both. Another check reports that.
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ArchitectureError(
            f"{type(model).__name__} looks at later tokens: it is an encoder. UniErase edits causal language models."
        )
    return seen[0], calls
