"""Both stages in a straight line: one request at a time, whole sequences, every logit, plain hooks and m x m solves.

Nothing here is cut, cached, batched or solved in a dual, so that it is slow and obviously right. What the package
computes is compared with it. It shares no code with the package but the search for a model's parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.models.architecture import Architecture, stores_input_first
from unierase_plugin.models.experts import Experts


class At(NamedTuple):
    """A prompt's token ids and the index of the token that carries the edit."""

    ids: tuple[int, ...]
    position: int


class Fact(NamedTuple):
    """One request: its prompt bare and in contexts, the prompt of the KL term, what is to follow the token, and, with
    the token masked, the answer that is to become unlikely and what is to be said instead.
    """

    prompts: tuple[At, ...]
    kl_prompt: At | None
    continuation: tuple[int, ...]
    unwanted: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()


def log_probabilities(arch: Architecture, ids: Sequence[int]) -> Tensor:
    """(T, V) of one sequence alone."""
    logits: Tensor = arch.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


# --- Stage I ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_rows(arch: Architecture, token_id: int, input_row: Tensor, output_row: Tensor | None) -> None:
    """Puts a token's rows where the model itself reads them."""
    arch.model.get_input_embeddings().weight[token_id] = input_row
    head = arch.model.get_output_embeddings()
    if output_row is not None:
        head.weight[token_id] = output_row
        if getattr(head, "bias", None) is not None:
            head.bias[token_id] = 0


def token_loss(
    arch: Architecture, token_id: int, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens after prompt and token, with the rows in the model."""
    total, count = torch.zeros(()), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logs = log_probabilities(arch, [*prompt, token_id, *answer])
        for index, wanted in enumerate(answer):
            total = total - logs[len(prompt) + index, wanted]
            count += 1
    return total / count


# --- Stage II: values -------------------------------------------------------------------------------------------------


@contextmanager
def added(block: nn.Module, position: int, delta: Tensor) -> Iterator[None]:
    """A vector added to a block's output at one position of the only sequence."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, (tuple, list)) else output).clone()
        hidden[0, position] = hidden[0, position] + delta.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def value(
    arch: Architecture, fact: Fact, token_id: int, hparams: UniEraseHyperParams
) -> tuple[Tensor, int, float, list[float]]:
    """(z, steps taken, probability of the token at the end, the goal at every step) of one request."""
    states, steps, probabilities, goals = shared_values(arch, [fact], token_id, hparams)
    return states[0], steps, probabilities[0], [each[0] for each in goals]


def shared_values(
    arch: Architecture, facts: Sequence[Fact], token_id: int, hparams: UniEraseHyperParams
) -> tuple[list[Tensor], int, list[float], list[list[float]]]:
    """(z each, steps taken, the token's probability each, goals each by step) of requests that share one delta."""
    layer = hparams.layers[-1]
    starts = [state(arch, fact.prompts[0], layer) for fact in facts]
    # With a norm after the MLP, delta is added in front of it, divided by the norm's gain.
    normed = hasattr(arch.blocks[layer], "post_feedforward_layernorm")
    block: Any = arch.projection_module(layer) if normed else arch.blocks[layer]
    lever = 1 / (sum(gain(arch, fact.prompts[0], layer) for fact in facts) / len(facts)) if normed else 1.0
    scale = torch.stack([start.norm() for start in starts]).mean()
    rms = scale / len(starts[0]) ** 0.5
    with torch.no_grad():
        before = [log_probabilities(arch, fact.kl_prompt.ids)[-1] if fact.kl_prompt else None for fact in facts]

    delta = torch.zeros_like(starts[0], requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=hparams.v_lr * float(rms), eps=1e-6 / float(rms))
    history: list[list[float]] = []
    steps = 0
    while True:
        loss = hparams.v_weight_decay * (delta.square().sum() + 1e-12).sqrt() / scale.square()
        goals, probabilities = [], []
        for fact, reference in zip(facts, before, strict=True):
            token, rest, told, instead = torch.zeros(4).unbind()
            for prompt in fact.prompts:
                with added(block, prompt.position, lever * delta):
                    logs = log_probabilities(arch, [*prompt.ids, token_id, *fact.continuation])
                end = len(prompt.ids) - 1
                token = token - logs[end, token_id] / len(fact.prompts)
                for index, wanted in enumerate(fact.continuation):
                    rest = rest - logs[end + 1 + index, wanted] / len(fact.continuation) / len(fact.prompts)
                with added(block, prompt.position, lever * delta):
                    for p in masked_probabilities(arch, prompt.ids, fact.unwanted, token_id):
                        told = told - (1 - p).log() / len(fact.unwanted) / len(fact.prompts)
                    for p in masked_probabilities(arch, prompt.ids, fact.instead, token_id):
                        instead = instead - p.log() / len(fact.instead) / len(fact.prompts)
            goal = token + hparams.v_continuation_weight * (rest + instead) + hparams.v_unlikely_weight * told
            weight = 1 + hparams.v_continuation_weight * (bool(fact.continuation) + bool(fact.instead))
            weight += hparams.v_unlikely_weight * bool(fact.unwanted)
            goals.append(float(goal.detach()) / weight)
            probabilities.append(float((-token.detach()).exp()))
            loss = loss + goal / len(facts)
            if fact.kl_prompt is not None and reference is not None:
                with added(block, fact.kl_prompt.position, lever * delta):
                    after = log_probabilities(arch, fact.kl_prompt.ids)[-1]
                kl = (reference.exp() * (reference - after)).sum()
                loss = loss + hparams.kl_factor * kl / len(facts)
        history.append(goals)
        if max(goals) < hparams.v_stop_loss or steps == hparams.v_num_grad_steps:
            reached = [start + delta for start in starts]
            if normed:
                reached = []
                for fact in facts:
                    with added(block, fact.prompts[0].position, lever * delta):
                        reached.append(state(arch, fact.prompts[0], layer))
            return [each.detach() for each in reached], steps, probabilities, history
        (delta.grad,) = torch.autograd.grad(loss, delta)
        optimiser.step()
        steps += 1
        with torch.no_grad():
            limit = hparams.clamp_norm_factor * scale
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())


def gain(arch: Architecture, prompt: At, layer: int) -> float:
    """|J^T s| / |s|, for s of 1 and -1 in turn: J is the derivative of a block's output by its projection's output."""
    seen: list[Tensor] = []
    handle = arch.blocks[layer].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    nothing = torch.zeros(arch.hidden_size, requires_grad=True)
    both = torch.tensor([1.0, -1.0]).repeat(arch.hidden_size // 2)
    with added(arch.projection_module(layer), prompt.position, nothing):
        log_probabilities(arch, prompt.ids)
    handle.remove()
    (found,) = torch.autograd.grad((seen[0][0, prompt.position] * both).sum(), nothing)
    return float(found.norm() / both.norm())


def masked_probabilities(arch: Architecture, ids: Sequence[int], answer: Sequence[int], token_id: int) -> list[Tensor]:
    """Of each token of an answer after a prompt, as it is where the token's logit is taken out."""
    if not answer:
        return []
    logits: Tensor = arch.model(torch.tensor([[*ids, *answer]]), use_cache=False).logits[0].float()
    logits = torch.where(torch.arange(logits.shape[1]) == token_id, -torch.inf, logits)
    return [logits[len(ids) - 1 + index].softmax(-1)[word] for index, word in enumerate(answer)]


# --- Stage II: keys and statistics ------------------------------------------------------------------------------------


@torch.no_grad()
def inputs(arch: Architecture, ids: Sequence[int], layer: int) -> Tensor:
    """(T, m): what the MLP output projection of a block reads over one sequence."""
    if isinstance(arch.projections[layer], Experts):
        return expert_keys(arch, ids, layer)
    seen: list[Tensor] = []
    handle = arch.dense(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        log_probabilities(arch, ids)
    finally:
        handle.remove()
    return seen[0].reshape(len(ids), -1).float()


def _summed(module: Any, count: int) -> Any:
    return lambda hidden: module(hidden.movedim(0, 1).flatten(0, 1)).reshape(count, len(hidden), -1).sum(0)


def expert_keys(arch: Architecture, ids: Sequence[int], layer: int) -> Tensor:
    """(T, m): keys over all experts of a block, from gradients: that of <u, y> for D_e is u kappa_e^T."""
    experts = arch.projections[layer]
    assert isinstance(experts, Experts)
    seen: list[Any] = []
    handle = experts.module.register_forward_pre_hook(lambda module, args: seen.extend(args))
    try:
        log_probabilities(arch, ids)
    finally:
        handle.remove()
    if not experts.order:  # each expert reads its own: (E T, d), and the block adds their outputs up
        module, seen = (
            _summed(experts.module, experts.count),
            [seen[0].reshape(experts.count, len(ids), -1).movedim(1, 0)],
        )
    else:
        module = experts.module
    weight, rows = experts.weight, []
    before = weight.requires_grad
    for token in range(len(ids)):
        with torch.enable_grad():
            weight.requires_grad_(True)
            out = module(*(each[token : token + 1].detach() for each in seen))[0]
            if not out.requires_grad:  # no expert of this token has a matrix
                rows.append(torch.zeros(experts.width))
                continue
            u = torch.randn(out.shape, generator=torch.Generator().manual_seed(token))
            (gradient,) = torch.autograd.grad((out * u).sum(), weight)
        of_d = gradient.transpose(1, 2) if experts.input_first else gradient  # (E, d, I)
        rows.append(torch.einsum("d,edi->ei", u, of_d).flatten() / u.square().sum())
    weight.requires_grad_(before)
    return torch.stack(rows)


@torch.no_grad()
def state(arch: Architecture, prompt: At, layer: int) -> Tensor:
    """(d,): output of a block at the fact's position."""
    seen: list[Tensor] = []
    handle = arch.blocks[layer].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, (tuple, list)) else output)
    )
    try:
        log_probabilities(arch, prompt.ids)
    finally:
        handle.remove()
    return seen[0][0, prompt.position].float()


def keys(arch: Architecture, prompts: Sequence[Sequence[At]], layer: int) -> Tensor:
    """(m, n): for each request, the mean over its contexts."""
    columns: list[Any] = []
    for contexts in prompts:
        total = sum(inputs(arch, prompt.ids, layer)[prompt.position] for prompt in contexts)
        columns.append(total / len(contexts))
    return torch.stack(columns, dim=1)


def states(arch: Architecture, prompts: Sequence[Sequence[At]], layer: int) -> Tensor:
    """(d, n): of the bare prompts."""
    return torch.stack([state(arch, contexts[0], layer) for contexts in prompts], dim=1)


def second_moment(
    arch: Architecture, sequences: Sequence[Sequence[int]], layer: int, skip_first: int = 0
) -> tuple[Tensor, int]:
    """(E[k k^T], number of tokens), token by token in float64."""
    total, count = torch.zeros(()), 0
    for sequence in sequences:
        for key in inputs(arch, sequence, layer)[skip_first:]:
            total = total + torch.outer(key.double(), key.double())
            count += 1
    return total / count, count


# --- Stage II: closed forms, in the primal ----------------------------------------------------------------------------


def lifted(moment: Tensor, jitter: float) -> Tensor:
    """A moment with a share of its mean eigenvalue on the diagonal."""
    moment = moment.double()
    return moment + jitter * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)


def ridge(keys: Tensor, residual: Tensor, moment: Tensor) -> Tensor:
    """R K^T (M + K K^T)^{-1}."""
    k, r, m = keys.double(), residual.double(), moment.double()
    inverse: Tensor = torch.linalg.inv(m + k @ k.T)
    return r @ k.T @ inverse


def null_space(
    keys: Tensor, residual: Tensor, moment: Tensor, threshold: float, rho: float, earlier: Tensor | None = None
) -> Tensor:
    """R K^T P (K_p K_p^T P + K K^T P + rho I)^{-1}."""
    k, r = keys.double(), residual.double()
    past = k.new_zeros(len(k), 1) if earlier is None else earlier.double()
    values, vectors = torch.linalg.eigh(moment.double())
    free = vectors[:, values < threshold * values.max()]
    project = free @ free.T
    inner = past @ past.T @ project + k @ k.T @ project + rho * torch.eye(len(k), dtype=torch.float64)
    inverse: Tensor = torch.linalg.inv(inner)
    return r @ k.T @ project @ inverse  # type: ignore[no-any-return]


def edit(
    arch: Architecture,
    prompts: Sequence[Sequence[At]],
    wanted: Tensor,
    moments: Mapping[int, Tensor],
    hparams: UniEraseHyperParams,
    jitter: float,
) -> dict[int, Tensor]:
    """Delta (d, m) by layer; `wanted` is Z (d, n). Leaves the model edited."""
    out = {}
    for index, layer in enumerate(hparams.layers):
        k = keys(arch, prompts, layer)
        residual = (wanted - states(arch, prompts, hparams.layers[-1])) / (len(hparams.layers) - index)
        if hparams.solver == "ridge":
            delta = ridge(k, residual, lifted(hparams.mom2_update_weight * moments[layer], jitter))
        else:
            delta = null_space(k, residual, moments[layer], hparams.nullspace_threshold, hparams.L2)
        out[layer] = delta
        weight = arch.projections[layer].weight
        with torch.no_grad():
            weight.add_((delta.T if stores_input_first(arch.projections[layer]) else delta).to(weight.dtype))
    return out
