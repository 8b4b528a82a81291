"""The routed experts of one block: their stacked down projections, and the key of a token over all of them.

The block's output is linear in the down projections D_1 ... D_E side by side, with the key
kappa = [p_1 k_1; ...; p_E k_E]: k_e is what enters D_e, and p_e is the router's weight, 0 where the token is not
routed. So a mixture of experts is one projection of width m = E I, whose keys are sparse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import ArchitectureError, reason

#: How far an output rebuilt from keys may differ from the module's own, relative: in float32, and in coarser types.
EXACT, COARSE = 1e-3, 0.05

#: Receives the routing of one pass.
LookAtRouting = Callable[["Routing"], None]


@dataclass(frozen=True)
class Routing:
    """What the experts of one block received in a pass: N tokens, each sent to up to k experts."""

    #: What the experts read; (E, N, d) if each expert reads its own (`Experts.order`).
    hidden: Float[Tensor, "*E N d"]
    #: The experts' numbers. E or more, and less than 0, stand for no expert.
    index: Int[Tensor, "N k"]
    #: The router's weights.
    weights: Float[Tensor, "N k"]

    def select(self, rows: Tensor) -> Routing:
        rows = rows.to(self.hidden.device)
        return Routing(self.hidden[..., rows, :], self.index[rows], self.weights[rows])


@dataclass(frozen=True)
class Experts:
    """Where a module of experts has its down projections, and how it is called."""

    #: Name of the module within the model.
    name: str
    module: nn.Module
    #: Name of its parameter (E, d, I), or (E, I, d) if `input_first`.
    parameter: str
    input_first: bool
    #: Name of the biases (E, d) of the down projections; empty without.
    bias_name: str
    #: Where hidden states, index and weights stand among the arguments of its forward pass. Empty if there is one
    #: argument (E N, d): every expert reads all tokens, times the router's weight, and the block adds the outputs up.
    order: tuple[int, ...]
    #: How many experts of a token a call must name. Some modules fail with one alone; a further one gets the weight 0.
    slots: int = 1

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.module, self.parameter)
        return found

    @property
    def weight_name(self) -> str:
        return f"{self.name}.{self.parameter}"

    @property
    def count(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def inner(self) -> int:
        """I, the inner width of one expert."""
        return self.weight.shape[1 if self.input_first else 2]

    @property
    def width(self) -> int:
        """m = E I. The key of expert e is in the places from e I on."""
        return self.count * self.inner

    def of_expert(self, number: int) -> Float[Tensor, "d I"]:
        """The down projection of one expert, as a view."""
        weight = self.weight[number]
        return weight.T if self.input_first else weight

    def matrix(self) -> Float[Tensor, "d m"]:
        """All down projections side by side, as a copy."""
        stacked = self.weight.detach()
        return (stacked.permute(2, 0, 1) if self.input_first else stacked.permute(1, 0, 2)).reshape(-1, self.width)

    # --- keys ---------------------------------------------------------------------------------------------------------

    def keys(self, routing: Routing) -> Float[Tensor, "N m"]:
        """The keys over all experts, in the dtype of the hidden states."""
        rows, experts, parts = self.parts(routing)
        whole = parts.new_zeros(len(routing.index) * self.count, self.inner)
        # A router may send a token to one expert twice.
        whole.index_add_(0, rows * self.count + experts, parts)
        return whole.reshape(-1, self.width)

    @torch.no_grad()
    def parts(self, routing: Routing) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"], Float[Tensor, "R I"]]:
        """The parts p_e k_e of all keys that are not 0 by routing: the token's number, the expert's number, the part.

        The module itself computes them, with down projections that are identities.
        """
        rows = torch.arange(len(routing.index), device=routing.index.device)
        rows = rows.repeat_interleave(routing.index.shape[1])
        experts, weights = routing.index.flatten(), routing.weights.flatten()
        there = ((experts >= 0) & (experts < self.count)).nonzero().squeeze(1)
        rows, experts, weights = rows[there], experts[there], weights[there]
        single = routing
        if self.order:
            alone = torch.nn.functional.pad(weights[:, None], (0, self.slots - 1))
            single = Routing(routing.hidden[rows], experts[:, None].expand(-1, self.slots), alone)
        size, found = routing.hidden.shape[-1], []
        for start in range(0, self.inner, size):
            width = min(size, self.inner - start)
            out = self.run(single, self._identity(start, width), 0)[..., :width]
            found.append(out if self.order else out[experts, rows])
        return rows, experts, torch.cat(found, dim=1)

    def _identity(self, start: int, width: int) -> Tensor:
        """Down projections that put the inputs from `start` on, `width` many, into the first outputs."""
        matrix = self.weight.new_zeros(self.weight.shape[1:])
        places = torch.arange(width, device=matrix.device)
        matrix[(start + places, places) if self.input_first else (places, start + places)] = 1
        # Not a view of one matrix: fused products want every expert's own.
        return matrix.expand(self.weight.shape).contiguous()

    def run(self, routing: Routing, weight: Tensor | None = None, bias: float | None = None) -> Float[Tensor, "*E N d"]:
        """The module's output with other down projections, and with all their biases equal; None: with its own."""
        swapped = {} if weight is None else {self.parameter: weight}
        if self.bias_name and bias is not None:
            swapped[self.bias_name] = torch.full_like(getattr(self.module, self.bias_name), bias)
        given = dict(zip(self.order, (routing.hidden, routing.index, routing.weights), strict=False))
        whole = tuple(given[place] for place in range(3)) if self.order else (routing.hidden.flatten(0, 1),)
        out: Tensor = torch.func.functional_call(self.module, swapped, whole)
        return out if self.order else out.reshape(routing.hidden.shape)

    def routing(self, given: Sequence[Any]) -> Routing:
        """The arguments of a call as data."""
        if self.order:
            return Routing(*(given[place] for place in self.order))
        hidden = given[0].reshape(self.count, -1, given[0].shape[1])
        numbers = torch.arange(self.count, device=hidden.device)
        # An expert that a token is not sent to reads zeros.
        index = torch.where(hidden.any(2).T, numbers, -1)
        return Routing(hidden, index, hidden.new_ones(index.shape))

    # --- hooks --------------------------------------------------------------------------------------------------------

    def watch(self, look: LookAtRouting) -> torch.utils.hooks.RemovableHandle:
        """Shows `look` what the experts receive, once."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # First, since `look` may run the module.
            handle.remove()
            look(self.routing(arguments(module, args, kwargs)))

        handle = self.module.register_forward_pre_hook(before, with_kwargs=True)
        return handle


class RoutedKeys:
    """The keys (B, T, m) of a pass, computed where they are indexed: all of them may not fit into the memory."""

    def __init__(self, experts: Experts, routing: Routing, numbers: Int[Tensor, "B T"]) -> None:
        """numbers: of each place's token among those of the routing."""
        self._experts, self._routing, self._numbers = experts, routing, numbers.cpu()

    def at_columns(self, columns: Int[Tensor, "B S"]) -> RoutedKeys:
        """The keys (B, S, m) at some places of each row."""
        return RoutedKeys(self._experts, self._routing, self._numbers.gather(1, columns.cpu()))

    def __getitem__(self, places: Any) -> Tensor:
        rows = self._numbers[places]
        return self._experts.keys(self._routing.select(rows.flatten())).reshape(*rows.shape, -1)


# --- finding ---------------------------------------------------------------------------------------------------------


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """A call's arguments, in the order of the signature."""
    try:
        return list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    except TypeError:
        return [*args, *kwargs.values()]


def stacked_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a block that have weights with three axes. A convolution's kernel has three axes as well."""
    for name, module in block.named_modules():
        own = () if isinstance(module, nn.Conv1d) else module.parameters(recurse=False)
        if any(weight.ndim == 3 for weight in own):
            yield name, module


def argument_order(given: list[Any]) -> tuple[int, ...] | None:
    """The places of hidden states (N, d), index (N, k) and weights (N, k) among arguments; None for other arguments.

    Empty for one argument (E N, d).
    """
    tables = [at for at, each in enumerate(given) if isinstance(each, Tensor) and each.ndim == 2]
    whole = [at for at in tables if not given[at].dtype.is_floating_point and given[at].dtype != torch.bool]
    if len(given) == len(tables) == 1 and not whole:
        return ()
    if len(given) != 3 or len(tables) != 3 or len(whole) != 1:
        return None
    index = whole[0]
    weights = [at for at in tables if at != index and given[at].shape == given[index].shape]
    hidden = [at for at in tables if at not in (index, *weights) and len(given[at]) == len(given[index])]
    return (hidden[0], index, weights[0]) if len(weights) == len(hidden) == 1 else None


@torch.no_grad()
def find_experts(name: str, module: nn.Module, given: list[Any], hidden_size: int) -> Experts:
    """The module's down projections, found by trying: only theirs rebuild the output of the call `given` from keys.

    Raises ArchitectureError with the reason if no weight does.
    """
    order = argument_order(given)
    if order is None:
        kinds = ", ".join(
            f"{each.dtype}{list(each.shape)}".removeprefix("torch.")
            if isinstance(each, Tensor)
            else type(each).__name__
            for each in given
        )
        raise ArchitectureError(
            f"The experts {name!r} are called with {kinds}, not with (tokens, width), (tokens, k) whole numbers and "
            "(tokens, k) weights, nor with (experts x tokens, width) alone: it is not known which token goes to which "
            "expert. Choose one projection by hand (rewrite_module_tmp), or another model."
        )
    width = given[order[0] if order else 0].shape[1]
    if width != hidden_size:
        raise ArchitectureError(
            f"The experts {name!r} take vectors of size {width}, not the hidden size {hidden_size}: "
            "their output is projected again. Choose one projection by hand (rewrite_module_tmp), or another model."
        )
    failed = ""
    for found in _candidates(name, module, order, hidden_size):
        try:
            if _rebuilds(found, given):
                return found
        except Exception as error:  # whatever a model's own code raises
            failed = f"{type(error).__name__}: {reason(error)}"
    why = f"they fail where each expert runs alone ({failed})" if failed else "a norm may follow each expert"
    raise ArchitectureError(
        f"The output of the experts {name!r} is not rebuilt from any of their stacked weights: {why}. So no closed "
        "form gives its edit. Choose one projection by hand (rewrite_module_tmp), or another model."
    )


def alike(known: Experts, name: str, module: nn.Module) -> Experts | None:
    """The same finding for another module of the same class and shapes; None if they differ."""

    def shapes(one: nn.Module) -> dict[str, tuple[int, ...]]:
        return {key: tuple(weight.shape) for key, weight in one.named_parameters(recurse=False)}

    same = type(known.module) is type(module) and shapes(known.module) == shapes(module)
    return replace(known, name=name, module=module) if same else None


def _candidates(name: str, module: nn.Module, order: tuple[int, ...], hidden_size: int) -> Iterator[Experts]:
    """Every weight with three axes that can map to the hidden size, in both layouts, with every possible bias."""
    weights = dict(module.named_parameters(recurse=False))
    for parameter, weight in weights.items():
        if weight.ndim != 3 or not weight.dtype.is_floating_point or weight.element_size() < 2:
            continue
        biases = [key for key, each in weights.items() if each.shape == (weight.shape[0], hidden_size)]
        for input_first in (False, True):
            if weight.shape[2 if input_first else 1] == hidden_size:
                for bias in (*biases, ""):
                    for slots in (1, 2):
                        yield Experts(name, module, parameter, input_first, bias, order, slots)


def _rebuilds(found: Experts, given: list[Any]) -> bool:
    """Whether sum_e D_e kappa_e plus the biases' part is the module's output. Another check reports NaN in weights."""
    if not found.order and len(given[0]) % found.count:
        return False
    routing = found.routing(given)
    if found.order:
        # Numbers above E may stand for experts that do nothing, or hand on what they read.
        routing = replace(routing, index=routing.index.clamp(0, found.count - 1))
    nothing = torch.zeros_like(found.weight)
    # Down projections of zeros give what the biases give: zeros without them, and something with them.
    if bool((found.run(routing, nothing, 0).abs() > 0).any()):
        return False
    if found.bias_name and not bool((found.run(routing, nothing, 1).abs() > 0).any()):
        return False
    whole, rebuilt = (
        out if found.order else out.sum(0) for out in (found.run(routing).float(), found.run(routing, nothing).float())
    )
    rows, experts, parts = found.parts(routing)
    for number in experts.unique().tolist():
        here = experts == number
        rebuilt.index_add_(0, rows[here], parts[here].float() @ found.of_expert(number).float().T)
    allowed = (EXACT if found.weight.dtype == torch.float32 else COARSE) * whole.norm()
    return not bool((rebuilt - whole).norm() > allowed)
