"""Stage I: the unlearning token (Yu et al. 2025, arXiv 2505.15674, section 4.1).

One new vocabulary entry is learned. After it the model shall continue with an "I don't know" sentence, whatever the
question before it. The model itself is frozen. Only a vector of the hidden size is optimised (two vectors if the LM
head is untied), not a masked embedding matrix. A hinge keeps the token's own probability on ordinary text small from
the first step, since a tied input row is an output row too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import TokenError
from .facts.request import one_spelling
from .hparams import UniEraseHyperParams
from .models.architecture import Architecture
from .models.chat_templates import templated
from .models.literal import text_ids
from .models.prefix import PrefixCache, cache_prefixes, continue_from
from .models.prompts import encode, has_chat_template, render
from .models.trace import pad, run_blocks, token_batches
from .models.weights import restored

#: Draws of the weights' noise in the last phase. Each draw has its own share of the questions.
NOISE_DRAWS = 4
#: Training batches of a phase. Further steps use them again, with the cached keys and values of the prompts.
GROUPS = 8
#: The guard's ordinary text: tokens of each text, and how many questions in every form.
GUARD_LENGTH, GUARD_QUESTIONS = 128, 16
#: The most tokens whose logits over the whole vocabulary are in memory together.
GUARD_BATCH = 512
#: Early stopping: smoothing of the loss, and how many steps may pass without improvement.
SMOOTHING, PATIENCE = 0.9, 25


@dataclass(frozen=True)
class UnlearningToken:
    """The token as data: name, id, and rows of the embedding and (if untied) of the LM head, (d,) float32 each."""

    name: str
    id: int
    input_row: Tensor
    output_row: Tensor | None
    #: Mean negative log-likelihood of the "I don't know" sentences at the end of training, in nats per token.
    loss: float
    steps: int
    #: Its largest probability on ordinary text, in the unedited model; NaN if it was not measured.
    leak: float = math.nan


@torch.no_grad()
def install_token(arch: Architecture, token: UnlearningToken) -> None:
    """Writes the token's rows into the model."""
    embedding = arch.embedding.weight
    embedding[token.id] = token.input_row.to(embedding.device, embedding.dtype)
    if token.output_row is not None:
        head = arch.head.weight
        head[token.id] = token.output_row.to(head.device, head.dtype)
        bias: Tensor | None = getattr(arch.head, "bias", None)
        if bias is not None:
            bias[token.id] = 0


@contextmanager
def installed(arch: Architecture, token: UnlearningToken) -> Iterator[None]:
    """Inside the block, the model has the token's rows. Afterwards it has its old rows, to the bit."""
    weights = [arch.embedding.weight]
    if token.output_row is not None:
        weights += [weight for weight in (arch.head.weight, getattr(arch.head, "bias", None)) if weight is not None]
    rows = [weight[token.id].detach().clone() for weight in weights]
    install_token(arch, token)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, row in zip(weights, rows, strict=True):
                weight[token.id] = row


def choose_sentence(question: str, sentences: Sequence[str]) -> str:
    """The "I don't know" sentence of a question. A digest chooses it, so every process and run chooses the same."""
    digest = hashlib.sha256(one_spelling(question).encode()).digest()
    return sentences[int.from_bytes(digest[:8], "big") % len(sentences)]


def answer_ids(tokenizer: Any, sentence: str, eos_id: int, close_with: int | None) -> tuple[int, ...]:
    """Token ids that follow the unlearning token: the sentence, `close_with` if it is given, and the end of text."""
    closing = () if close_with is None else (close_with,)
    return (*text_ids(tokenizer, sentence), *closing, eos_id)


def end_id(model: Any, tokenizer: Any) -> int:
    """The token that ends an answer: the chat template's end of turn if it has one, else the end of text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    if has_chat_template(tokenizer):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        turn = templated(tokenizer, turns, add_generation_prompt=False)
        tail = tokenizer(turn[turn.rfind("b") + 1 :], add_special_tokens=False)["input_ids"]
        for index in tail:
            if index in ends or index == tokenizer.eos_token_id:
                return int(index)
    known = [int(index) for index in (tokenizer.eos_token_id, *ends) if index is not None]
    if not known:
        raise TokenError(
            "The tokenizer has no end-of-text token, so an answer cannot be ended. Set tokenizer.eos_token."
        )
    return known[0]


def learn_token(
    arch: Architecture,
    tokenizer: Any,
    token_id: int,
    questions: Sequence[str],
    sentences: Sequence[str],
    ordinary_text: Sequence[str],
    hparams: UniEraseHyperParams,
    *,
    noise: float,
    max_tokens: int,
    pad_id: int,
    progress: Callable[[float, str], None] = lambda share, note: None,
) -> UnlearningToken:
    """Learns the token's rows on a frozen model: first on plain prompts, then on chat prompts too, then with noise.

    ordinary_text is for the leak guard. The noise is added to each projection that Stage II will edit; its Frobenius
    norm is `noise` times that of the projection. Raises TokenError if the loss becomes NaN.
    """
    trainer = _Trainer(
        arch=arch,
        tokenizer=tokenizer,
        token_id=token_id,
        questions=questions,
        sentences=sentences,
        ordinary_text=ordinary_text,
        hparams=hparams,
        noise=noise,
        max_tokens=max_tokens,
        pad_id=pad_id,
    )
    return trainer.train(progress)


@dataclass(frozen=True)
class _Rows:
    """Training rows whose prompts are cached with one draw of the noise, or without noise."""

    prefix: PrefixCache
    answers: list[tuple[int, ...]]
    noise: int | None


class _Trainer:
    def __init__(
        self,
        arch: Architecture,
        tokenizer: Any,
        token_id: int,
        questions: Sequence[str],
        sentences: Sequence[str],
        ordinary_text: Sequence[str],
        hparams: UniEraseHyperParams,
        noise: float,
        max_tokens: int,
        pad_id: int,
    ) -> None:
        self.arch, self.tokenizer, self.token_id, self.hparams = arch, tokenizer, token_id, hparams
        self.noise, self.pad_id, self.max_tokens = noise, pad_id, max_tokens
        self.generator = torch.Generator().manual_seed(hparams.seed)
        close = token_id if hparams.token_closes_answer else None
        eos = end_id(arch.model, tokenizer)
        self.questions = list(questions)
        self._groups: dict[tuple[int, int], _Rows] = {}
        self.answers = [answer_ids(tokenizer, choose_sentence(q, sentences), eos, close) for q in questions]
        self.softcap = getattr(arch.model.config.get_text_config(), "final_logit_softcapping", None)
        self.embedding_scale, self.logit_scale = _embedding_scale(arch), logit_scale(arch)
        start = _mean_row(arch.embedding.weight, tokenizer)
        # One vector if the head is tied, so the learned row is the saved row.
        self.rows = [start] if arch.tied else [start, _mean_row(arch.head.weight, tokenizer)]
        self.guard_states, self.guard_floor = self._guard(ordinary_text)

    def train(self, progress: Callable[[float, str], None]) -> UnlearningToken:
        h = self.hparams
        rows = [row.clone().requires_grad_(True) for row in self.rows]
        optimiser = torch.optim.Adam(rows, lr=h.token_lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, h.token_num_steps, eta_min=h.token_lr / 20)
        smooth, best, best_step, nll = math.nan, math.inf, 0, math.nan
        step = 0
        for step in range(1, h.token_num_steps + 1):
            optimiser.zero_grad()
            nll = self._backward(rows, self._group(step - 1))
            if not math.isfinite(nll):
                raise TokenError(f"Stage I's loss became {nll} at step {step}. Lower token_lr ({h.token_lr}).")
            optimiser.step()
            schedule.step()
            smooth = nll if math.isnan(smooth) else SMOOTHING * smooth + (1 - SMOOTHING) * nll
            progress(step / h.token_num_steps, f"loss {smooth:.2f}")
            if self._phase(step - 1) < 2 or smooth < 0.98 * best:
                best, best_step = smooth, step
            elif step - best_step >= PATIENCE:
                break
        learned = [row.detach().float().cpu() for row in rows]
        return UnlearningToken(
            name=h.unlearning_token,
            id=self.token_id,
            input_row=learned[0],
            output_row=None if self.arch.tied else learned[1],
            loss=smooth,
            steps=step,
        )

    def _phase(self, step: int) -> int:
        """0: plain prompts; 1: chat prompts too; 2: noise too."""
        share = step / self.hparams.token_num_steps
        return 0 if share < 0.15 else 1 if share < 0.5 else 2

    def _group(self, step: int) -> _Rows:
        """The rows of a step. A phase has few groups. Each group's prompts run once and serve many steps."""
        phase = self._phase(step)
        key = (phase, step % GROUPS)
        if key not in self._groups:
            self._groups[key] = self._new_group(phase, step % NOISE_DRAWS)
        return self._groups[key]

    def _new_group(self, phase: int, draw: int) -> _Rows:
        forms = ["plain"] if phase == 0 or not has_chat_template(self.tokenizer) else ["plain", "chat"]
        noise = draw if phase == 2 and self.noise else None
        chosen = torch.randperm(len(self.questions), generator=self.generator)[: self.hparams.token_batch_size].tolist()
        prompts = [
            encode(self.tokenizer, self._render(self.questions[index], forms[k % len(forms)]), forms[k % len(forms)])
            for k, index in enumerate(chosen)
        ]
        with self._noise(noise):
            prefix = cache_prefixes(self.arch, prompts, self.pad_id)
        return _Rows(prefix, [self.answers[index] for index in chosen], noise)

    def _render(self, question: str, form: str) -> str:
        return render(self.tokenizer, question, form, self.hparams.chat_template_kwargs)

    def _backward(self, rows: Sequence[Tensor], group: _Rows) -> float:
        """Adds the gradients of the answers' cross-entropy after the token and the guard. Returns the former (nats)."""
        suffix = continue_from(group.prefix, [(self.token_id, *answer[:-1]) for answer in group.answers], self.pad_id)
        points = [(r, c, wanted) for r, answer in enumerate(group.answers) for c, wanted in enumerate(answer)]
        at_row, at_column, wanted = (torch.tensor(column) for column in zip(*points, strict=True))
        spot = (suffix.ids == self.token_id)[..., None]

        def put_row(output: Tensor) -> Tensor:
            return torch.where(spot, (rows[0] * self.embedding_scale).to(output.dtype), output)

        # The backward pass must see the same noisy weights as the forward pass.
        with self._noise(group.noise):
            trace = run_blocks(
                self.arch, suffix, cache=group.prefix.fresh(), embed=put_row, head_at=(at_row, at_column)
            )
            logits = self._with_token(trace.logits, trace.head_inputs, rows[-1])
            nll = torch.nn.functional.cross_entropy(logits, wanted.to(logits.device))
            (nll + self.hparams.token_guard_weight * self._hinge(rows[-1])).backward(inputs=list(rows))
        return float(nll.detach())

    def _with_token(self, logits: Tensor, states: Tensor, row: Tensor) -> Tensor:
        """The logits, with the token's own column computed from the vector in training."""
        own = self._logit(states.float(), row)[:, None]
        column = torch.arange(logits.shape[1], device=logits.device) == self.token_id
        return torch.where(column, own, logits.float())

    def _logit(self, states: Tensor, row: Tensor) -> Tensor:
        """The logits (N,) of a row of the LM head for inputs (N, d), scaled and capped as in the model."""
        raw = self.logit_scale * (states @ row)
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def _hinge(self, row: Tensor) -> Tensor:
        """Mean squared excess of the token's logit above floor - margin (nats), over positions with an excess."""
        gap = self._logit(self.guard_states, row) - self.guard_floor + self.hparams.token_guard_margin
        over = gap.clamp(min=0)
        return over.square().sum() / (over > 0).sum().clamp(min=1)

    @torch.no_grad()
    def _guard(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, d) head inputs over ordinary text and questions in every form, and (N,) logsumexp of all other tokens."""
        forms = ["plain", "chat"] if has_chat_template(self.tokenizer) else ["plain"]
        sequences = [self.tokenizer(text)["input_ids"][:GUARD_LENGTH] for text in texts]
        asked = self.questions[:GUARD_QUESTIONS]
        sequences += [encode(self.tokenizer, self._render(q, f), f) for q in asked for f in forms]
        states, floors = [], []
        for rows in token_batches(sequences, min(self.max_tokens, GUARD_BATCH)):
            batch = pad([sequences[row] for row in rows], self.pad_id, "right", self.arch.device)
            at_row, at_column = batch.mask.nonzero(as_tuple=True)
            trace = run_blocks(self.arch, batch, head_at=(at_row, at_column))
            logits = trace.logits.float()
            logits[:, self.token_id :] = -math.inf  # the token itself, and padding rows that no text uses
            states.append(trace.head_inputs.float())
            floors.append(logits.logsumexp(1))
        return torch.cat(states), torch.cat(floors)

    @contextmanager
    def _noise(self, draw: int | None) -> Iterator[None]:
        """Inside the block, the projections to edit have noise of draw `draw`. It is removed afterwards, to the bit."""
        if draw is None:
            yield
            return
        weights = [self.arch.projections[layer].weight for layer in self.hparams.layers]
        generator = torch.Generator().manual_seed(self.hparams.seed * NOISE_DRAWS + draw + 1)
        with restored(weights):
            with torch.no_grad():
                for weight in weights:
                    noise = torch.randn(weight.shape, generator=generator)
                    size = self.noise * float(weight.float().norm()) / float(noise.norm())
                    weight.add_((noise * size).to(weight.device, weight.dtype))
            yield


def _mean_row(matrix: Tensor, tokenizer: Any) -> Tensor:
    """The start of the training: the mean row of the words "I don't know"."""
    ids = tokenizer("I don't know", add_special_tokens=False)["input_ids"]
    return matrix.detach()[ids].float().mean(0)


@torch.no_grad()
def _embedding_scale(arch: Architecture) -> float:
    """The factor by which an embedding layer multiplies its rows (Gemma 3 scales inside the layer; most do not)."""
    index = int(arch.embedding.weight.float().norm(dim=1).argmax())
    row = arch.embedding.weight[index].float()
    out = arch.embedding(torch.tensor([index], device=row.device))[0].float()
    return float((out @ row) / (row @ row))


@torch.no_grad()
def logit_scale(arch: Architecture) -> float:
    """The factor on the head's output (Cohere and Granite have one; most do not). A model that caps gets 1."""
    raw: list[Tensor] = []
    handle = arch.head.register_forward_hook(lambda module, args, output: raw.append(output[0, 0].float()))
    try:
        logits = arch.model(torch.tensor([[1]], device=arch.device), use_cache=False).logits[0, 0].float()
    finally:
        handle.remove()
    capped = getattr(arch.model.config.get_text_config(), "final_logit_softcapping", None) is not None
    return 1.0 if capped or torch.equal(logits, raw[0]) else float((logits @ raw[0]) / (raw[0] @ raw[0]))
