"""What a model writes and how likely texts are to it: generation, answers, perplexity, the token's leak.

Text is generated independently of the model's own generation settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .earlier import keeps_plain_layers, reads_left_padding
from .prompts import encode, render
from .trace import pad, run_batches, token_batches

#: Bytes of float32 logits in one batch, at most.
LOGIT_BYTES = 1 << 27


@torch.no_grad()
def generate(
    model: Any, ids: Tensor, mask: Tensor, room: int, pad_id: int, *, temperature: float = 0.0, **settings: Any
) -> Tensor:
    """Ids (B, n), n at most `room`, that follow left-padded prompts (B, T), with end tokens and padding after them.

    Greedy at temperature 0, else sampled from the whole distribution. Of the model's own settings only the end tokens
    count: beams, penalties and forbidden repetitions would change the measurement. `settings` go to the model's
    `generate`. A model that reads padding as text is given prompts of one length at a time.
    """
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    lengths = mask.sum(1)
    apart = bool((lengths < ids.shape[1]).any()) and not keeps_plain_layers(model) and not reads_left_padding(model)
    groups = lengths.unique().tolist() if apart else [ids.shape[1]]
    out = ids.new_full((len(ids), room), pad_id)
    longest = 0
    with ends_alone(model, pad_id):
        for length in groups:
            rows = lengths == length if apart else slice(None)
            found: Tensor = model.generate(
                input_ids=ids[rows, -length:],
                attention_mask=mask[rows, -length:],
                max_new_tokens=room,
                **drawn,
                **settings,
            )
            written = found[:, length:]
            out[rows, : written.shape[1]] = written
            longest = max(longest, written.shape[1])
    return out[:, :longest]


@contextmanager
def ends_alone(model: Any, pad_id: int) -> Iterator[None]:
    """Inside, the model's own settings are its end tokens alone: transformers fills up a given config from them."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad_id)
    try:
        yield
    finally:
        model.generation_config = own


def answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    form: str = "chat",
    template_kwargs: dict[str, Any] | None = None,
    max_new_tokens: int = 32,
    max_tokens: int = 8192,
    progress: Callable[[float], None] = lambda share: None,
) -> list[str]:
    """Greedy answers. Special tokens other than the end stay in the text, so that an unlearning token is visible."""
    prompts = [encode(tokenizer, render(tokenizer, question, form, template_kwargs), form) for question in questions]
    generated = continue_greedily(model, tokenizer, prompts, max_new_tokens, max_tokens, progress)
    pad_id = pad_token_id(model, tokenizer)
    return [decode_answer(model, tokenizer, ids, pad_id) for ids in generated]


@torch.no_grad()
def continue_greedily(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_tokens: int = 8192,
    progress: Callable[[float], None] = lambda share: None,
) -> list[list[int]]:
    """The token ids that follow each prompt, with end tokens and the padding after them."""
    pad_id = pad_token_id(model, tokenizer)
    room = [[0] * (len(prompt) + max_new_tokens) for prompt in prompts]
    out: dict[int, list[int]] = {}

    def run(rows: list[int]) -> None:
        batch = pad([prompts[row] for row in rows], pad_id, "left", model.get_input_embeddings().weight.device)
        written = generate(model, batch.ids, batch.mask, max_new_tokens, pad_id)
        out.update(zip(rows, written.tolist(), strict=True))
        progress(len(out) / len(prompts))

    run_batches(room, max_tokens, run)
    return [out[row] for row in range(len(prompts))]


def decode_answer(model: Any, tokenizer: Any, ids: list[int], pad_id: int) -> str:
    """The text of generated ids up to the first token that ends a turn. Other special tokens stay."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id, pad_id}
    stop = next((index for index, token in enumerate(ids) if token in ends), len(ids))
    return str(tokenizer.decode(ids[:stop], skip_special_tokens=False))


def pad_token_id(model: Any, tokenizer: Any) -> int:
    """A token for padding. It is masked everywhere, so any token serves if the tokenizer names none."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.get_text_config().pad_token_id):
        if isinstance(index, int):
            return index
    return 0


def tokens_for_logits(model: Any) -> int:
    """Tokens of a batch whose logits over the whole vocabulary are needed. The logits take most of the memory."""
    return max(1, LOGIT_BYTES // (4 * int(model.config.get_text_config().vocab_size)))


def context_limit(model: Any) -> int:
    """The number of tokens that the model accepts; a number that no text reaches if the model does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood per token over texts, each on its own and cut to the model's context."""
    total, count = 0.0, 0
    encoded = (tokenizer(text)["input_ids"][: context_limit(model)] for text in texts)
    sequences = [ids for ids in encoded if len(ids) > 1]
    for rows in token_batches(sequences, tokens_for_logits(model)):
        device = model.get_input_embeddings().weight.device
        batch = pad([sequences[row] for row in rows], pad_token_id(model, tokenizer), "right", device)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.ids[:, 1:].to(logits.device), reduction="none"
        )
        counted = batch.mask[:, 1:].to(nll.device)
        total, count = total + float((nll * counted).sum()), count + int(counted.sum())
    # Not math.exp: it raises if the result is infinite.
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


@torch.no_grad()
def mean_log_likelihoods(
    model: Any, tokenizer: Any, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[float]:
    """Log-likelihood per token (nats) of each sequence from its start on, given the tokens before it."""
    out: dict[int, float] = {}

    def run(rows: list[int]) -> None:
        device = model.get_input_embeddings().weight.device
        batch = pad([sequences[row] for row in rows], pad_token_id(model, tokenizer), "right", device)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, :-1].float()
        said = -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.ids[:, 1:].to(logits.device), reduction="none"
        )
        for at, row in enumerate(rows):
            out[row] = float(said[at, starts[row] - 1 : len(sequences[row]) - 1].mean())

    run_batches(sequences, tokens_for_logits(model), run)
    return [out[row] for row in range(len(sequences))]


@torch.no_grad()
def token_leak(model: Any, tokenizer: Any, texts: Sequence[str], token_id: int) -> float:
    """The token's largest probability at any position of ordinary texts."""
    sequences = [tokenizer(text)["input_ids"][: context_limit(model)] for text in texts]
    worst = 0.0
    for rows in token_batches(sequences, tokens_for_logits(model)):
        device = model.get_input_embeddings().weight.device
        batch = pad([sequences[row] for row in rows], pad_token_id(model, tokenizer), "right", device)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits.float()
        probability = (logits[..., token_id] - logits.logsumexp(-1)).exp() * batch.mask.to(logits.device)
        worst = max(worst, float(probability.max()))
    return worst
