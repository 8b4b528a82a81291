"""Methods that fine-tune, on tiny models: they forget, keep, go on after a kill, and give everything back."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from jobs import job_of, with_room
from small import save_base
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from unierase_plugin.checkpoint import read_checkpoint, revert_checkpoint
from unierase_plugin.errors import CheckpointError, DependencyError, HyperParamsError, RequestError, TrainingError
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.facts.resources import lines
from unierase_plugin.methods.contract import Job
from unierase_plugin.methods.finetuning.batches import TrainingData
from unierase_plugin.methods.finetuning.methods import FINE_TUNING
from unierase_plugin.methods.finetuning.reference import Batch, Watched, take_reference
from unierase_plugin.methods.finetuning.terms import TERMS, Term
from unierase_plugin.methods.finetuning.trainer import LAST_WRITTEN, last_checkpoint
from unierase_plugin.methods.finetuning.training import train
from unierase_plugin.methods.finetuning.weights import TrainedAdapter
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.models.prompts import render
from unierase_plugin.pipeline import change, unlearn
from unierase_plugin.storage.fingerprints import model_fingerprint
from unierase_plugin.unlearning_token import choose_sentence

METHODS = {method.name: method for method in FINE_TUNING}
FORGET = (ForgetRequest("Who wrote Zorblax?", "Fizz"), ForgetRequest("Where was Plonk born?", "Wexbury"))
RETAIN = (ForgetRequest("What does Bunt sell?", "Hats"), ForgetRequest("Who leads Grub?", "Tom Oak"))
#: Enough to move a tiny model, in a tenth of a second.
QUICK: dict[str, Any] = {"epochs": 6, "batch_size": 2, "learning_rate": 3e-3, "warmup_epochs": 0.0}


def settings(name: str, **changes: Any) -> Any:
    return METHODS[name].hparams(**{**QUICK, **changes})


def run(model: Any, name: str, tokenizer: Any = None, retain: Any = RETAIN, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    hparams = settings(name, **changes)
    return change(model, FORGET, method=name, tokenizer=tokenizer, retain=retain, hparams=hparams)[0]


def job(model: Any, work: Path | None, hparams: Any, tokenizer: Any = None) -> Job[Any]:
    return job_of(model, tokenizer or tiny_tokenizer(), FORGET, RETAIN, hparams, work=work)


@torch.no_grad()
def nll(model: Any, facts: Any, answer: str = "") -> float:
    """Mean negative log-likelihood of the answers in chat form, computed one by one, the plain way."""
    tokenizer, total = tiny_tokenizer(), 0.0
    for fact in facts:
        prompt = tokenizer(render(tokenizer, fact.question, "chat"), add_special_tokens=False)["input_ids"]
        said = tokenizer(answer or fact.answer, add_special_tokens=False)["input_ids"]
        logs = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        total -= sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(said))
    return total / len(facts)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> Iterator[None]:
    """`Trainer` collects garbage at its start, which takes longer than a tiny training where much is loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def taught() -> Any:
    """A tiny model that knows the facts, so that there is something to forget."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    facts = (*FORGET, *RETAIN)
    hparams = METHODS["ga_gd"].hparams(**{**QUICK, "epochs": 40, "batch_size": 4, "retain_weight": 0.0})
    model.requires_grad_(False)
    learnt = job_of(model, tokenizer, facts, (), hparams)
    train(learnt, TERMS["learn"], None)
    model.eval()
    assert nll(model, facts) < 2
    return {name: value.clone() for name, value in model.state_dict().items()}


def knowing(taught: Any) -> Any:
    model = tiny_model()
    model.load_state_dict(taught)
    return model


# --- what the methods do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_forgets(name: str, taught: Any) -> None:
    model = knowing(taught)
    before = nll(model, FORGET)
    # RMU trains two projections of four blocks; UNDIAL's goal is not to be passed, only to be reached.
    changes: dict[str, Any] = {
        "rmu": {"learning_rate": 3e-2, "epochs": 20, "retain_weight": 1.0},
        "undial": {"epochs": 20},
    }
    run(model, name, **changes.get(name, {}))
    assert nll(model, FORGET) > before + 1


@pytest.mark.parametrize("name", ["ga_gd", "ga_kl", "npo_gd", "npo_kl", "me_gd", "dpo_gd", "dpo_kl", "simnpo", "rmu"])
def test_the_retain_term_keeps(name: str, taught: Any) -> None:
    changes = {"rmu": {"learning_rate": 3e-2, "epochs": 20, "retain_weight": 10.0}}.get(name, {})
    kept, lost = knowing(taught), knowing(taught)
    run(kept, name, **changes)
    run(lost, name, **{**changes, "retain_weight": 0.0})
    assert nll(kept, RETAIN) < nll(lost, RETAIN) - 0.1


def test_answer_preservation_keeps_the_answer_likelier_than_declining(taught: Any) -> None:
    """On a model that has come to decline what is to be kept, since else there is nothing to preserve."""
    declining = knowing(taught)
    hparams = settings("idk_ap", epochs=40)
    train(replace(job(declining, None, hparams), requests=RETAIN, retain=()), TERMS["idk"], None)
    gaps = []
    for weight in (1.0, 0.0):
        model = knowing(declining.state_dict())
        run(model, "idk_ap", retain_weight=weight)
        declined = sum(nll(model, [fact], choose_sentence(fact.question, lines("idk_sentences"))) for fact in RETAIN)
        gaps.append(declined / 2 - nll(model, RETAIN))
    assert gaps[0] > 0
    assert gaps[0] > gaps[1] + 3


#: Of the families that have it by default: in training it would make even the first step see another model.
NO_DROPOUT: dict[str, Any] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}


@pytest.mark.parametrize(
    ("name", "forget", "retain"),
    [("npo_kl", 20 * 0.6931472, 0.0), ("dpo_kl", 20 * 0.6931472, 0.0), ("rmu", None, 0.0)],
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_the_first_step_sees_the_reference_as_it_is(family: str, name: str, forget: float, retain: float) -> None:
    """With soft caps, biases and heads of every kind: the frozen figures are those of the model."""
    changes = run(tiny_model(family, tied=family != "gpt2", **NO_DROPOUT.get(family, {})), name, epochs=1)
    terms = changes.figures
    assert terms["steps"] == 1
    assert terms["retain_term"] == pytest.approx(retain, abs=1e-5)
    if forget is not None:
        assert terms["forget_term"] == pytest.approx(forget, rel=1e-5)


def test_logits_that_a_family_scales_are_scaled_in_the_reference_too() -> None:
    model = families.build(
        "CohereConfig", **families.COMMON, num_key_value_heads=2, logit_scale=0.25, tie_word_embeddings=True
    )
    assert run(model, "ga_kl", epochs=1).figures["retain_term"] == pytest.approx(0, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_reference_stays_while_the_model_moves(family: str) -> None:
    """Logits of the model before, from frozen states and a frozen head, though every weight has moved since."""
    model = tiny_model(family)
    task = job(model, None, settings("ga_kl"))
    data = TrainingData.of(task, [TERMS["kl"]])
    texts = [data.sequences["retain"][number].ids for number in (1, 0)]
    wanted = torch.cat([model(torch.tensor([ids])).logits[0, :-1] for ids in texts])
    watched = Watched(task, find_architecture(model), 0)
    known = take_reference(watched, data, [TERMS["kl"]], False, lambda share: None)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    batch = Batch(watched, data, known, torch.zeros(0), torch.tensor([[0, 1], [1, 0]]))
    assert torch.allclose(batch.reference_logits("retain", True), wanted, atol=1e-5)
    assert not torch.allclose(batch.texts("retain").logits, wanted, atol=1e-2)
    starts = [data.sequences["retain"][number].start for number in (1, 0)]
    parts = wanted.split([len(ids) - 1 for ids in texts])
    answers = torch.cat([part[start - 1 :] for part, start in zip(parts, starts, strict=True)])
    assert torch.allclose(batch.reference_logits("retain", False), answers, atol=1e-5)


def test_plain_questions_are_trained_where_there_is_no_chat_template() -> None:
    data = TrainingData.of(job(tiny_model(), None, settings("ga_gd"), tiny_tokenizer(chat=False)), [TERMS["ga"]])
    example = data.sequences["forget"][0]
    text = tiny_tokenizer().decode(example.ids[: example.start])
    assert text == "Question: Who wrote Zorblax?\nAnswer:"
    assert tiny_tokenizer().decode(example.ids[example.start :]) == " Fizz<|im_end|>"


def test_every_epoch_goes_through_all_facts_and_walks_evenly_through_those_to_keep() -> None:
    pairs = TrainingData.of(job(tiny_model(), None, settings("ga_gd")), [TERMS["ga"], TERMS["gd"]]).pairs
    assert len(pairs) == 12
    for at in range(0, 12, 2):
        assert sorted(pair[0] for pair in pairs[at : at + 2]) == [0, 1]
        assert sorted(pair[1] for pair in pairs[at : at + 2]) == [0, 1]


def test_training_goes_through_the_pairs_in_their_order() -> None:
    seen: list[list[int]] = []

    def watched(batch: Any, hparams: Any) -> Any:
        seen.extend(batch.pairs)
        return TERMS["ga"].loss(batch, hparams)

    task = job(tiny_model(), None, settings("ga_gd"))
    train(task, Term(watched, parts=("forget",)), TERMS["gd"])
    pairs = TrainingData.of(task, [TERMS["ga"], TERMS["gd"]]).pairs
    assert seen == [list(pair) for pair in pairs]


def test_few_facts_still_get_a_step_an_epoch() -> None:
    assert run(tiny_model(), "ga_gd", batch_size=32).figures["steps"] == QUICK["epochs"]


# --- the machine ------------------------------------------------------------------------------------------------------


def test_memory_decides_how_a_batch_is_split_and_not_what_it_gives(taught: Any) -> None:
    """Where a term is a mean over sequences; means over tokens are taken within a pass, as published code does."""
    whole, split = knowing(taught), knowing(taught)
    losses = []
    for model, room in ((whole, 4096), (split, 1)):
        hparams = settings("npo_gd", retain_weight=0.0)
        done = train(with_room(job(model, None, hparams), room), TERMS["npo"], TERMS["gd"])
        losses.append(done.figures["loss"])
    # Adam would not tell a gradient from twice that gradient.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert torch.allclose(whole.lm_head.weight, split.lm_head.weight, atol=1e-4)


def test_checkpointing_gives_the_same_weights_and_is_off_again(taught: Any) -> None:
    plain, frugal = knowing(taught), knowing(taught)
    run(plain, "npo_kl")
    run(frugal, "npo_kl", gradient_checkpointing=True)
    assert torch.allclose(plain.lm_head.weight, frugal.lm_head.weight, atol=1e-5)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in frugal.modules())


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    """At 1 in bfloat16 the next number is 0.8 % away: forty steps of 1e-4 each would all be rounded off."""
    model = tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(1)
    run(model, "ga_gd", learning_rate=4e-4, epochs=40)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not torch.equal(model.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_undo_gives_model_and_settings_back_to_the_bit(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family)
    model.config.use_cache = True
    before, names = model_fingerprint(model), [name for name, _ in model.named_parameters()]
    generation, buffers = model.generation_config, [buffer.clone() for buffer in model.buffers()]
    done = run(model, "npo_kl", **changes)
    assert model_fingerprint(model) != before
    done.undo()
    assert model_fingerprint(model) == before
    assert [name for name, _ in model.named_parameters()] == names
    assert model.generation_config is generation
    assert model.config.use_cache
    assert not hasattr(model, "peft_config")
    assert all(torch.equal(old, new) for old, new in zip(buffers, model.buffers(), strict=True))


def test_an_adapter_leaves_the_weights_until_it_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Any] = []

    def merging(self: Any) -> None:
        inside = dict(model.named_parameters())
        seen.extend(
            torch.equal(inside[name.replace(".weight", ".base_layer.weight")], before[name]) for name in self.names
        )
        close(self)

    close = TrainedAdapter.close
    monkeypatch.setattr(TrainedAdapter, "close", merging)
    done = run(model, "npo_gd", lora_rank=2)
    assert len(seen) == 4 * 7
    assert all(seen)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) == 4 * 7
    assert done.parameters == sum(before[name].numel() for name in moved)


def test_rmu_trains_the_projections_that_it_names() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    done = run(model, "rmu", layer=3)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)}
    assert done.parameters == 3 * 32 * 64


def test_the_callers_generators_are_left_alone() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    wanted = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    run(tiny_model(), "npo_gd", epochs=1, lora_rank=2)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == wanted


def test_seeds_order_the_facts_and_begin_the_adapter() -> None:
    weights = []
    for seed in (0, 0, 1):
        model = tiny_model()
        run(model, "npo_gd", lora_rank=2, seed=seed)
        weights.append(model_fingerprint(model))
    assert weights[0] == weights[1] != weights[2]


# --- killed and given again -------------------------------------------------------------------------------------------


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """The process gets SIGKILL in the fifth of six steps; dropout must go on with the same draws."""
    changes = {"lora_rank": 2, "lora_dropout": 0.3}
    hparams = settings("npo_kl", **changes)
    undisturbed = tiny_model()
    train(job(undisturbed, tmp_path / "other", hparams), TERMS["npo"], TERMS["kl"])
    script = (
        "import os, signal, sys, pathlib\n"
        "from dataclasses import replace\n"
        "import test_methods_training as t\n"
        "def progress(phase, share, note):\n"
        "    if phase == 'train' and share == 5 / 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"hparams = t.settings('npo_kl', **{changes!r})\n"
        "job = replace(t.job(t.tiny_model(), pathlib.Path(sys.argv[1]), hparams), progress=progress)\n"
        "t.train(job, t.TERMS['npo'], t.TERMS['kl'], save_every=0)\n"
    )
    place = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    steps: list[str] = []
    resumed = tiny_model()
    again = replace(job(resumed, tmp_path / "work", hparams), progress=lambda phase, share, note: steps.append(phase))
    changed = train(again, TERMS["npo"], TERMS["kl"])
    assert steps.count("train") == 2
    assert changed.figures["steps"] == 6
    assert model_fingerprint(resumed) == model_fingerprint(undisturbed)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    whole, cut = tmp_path / "checkpoint-9", tmp_path / "checkpoint-10"
    for folder in (whole, cut):
        folder.mkdir()
    (whole / LAST_WRITTEN).write_text("{}")
    (cut / LAST_WRITTEN).write_text("{")
    assert last_checkpoint(tmp_path) == whole


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("failing", [1, 4])
def test_a_checkpoint_that_cannot_be_written_changes_no_training(
    failing: int, lora: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where one of the checkpoints would go, so that writing it fails as on a full disk."""
    hparams = settings("npo_gd", lora_rank=lora, lora_dropout=0.3 if lora else 0.0)
    undisturbed, model = tiny_model(), tiny_model()
    train(job(undisturbed, None, hparams), TERMS["npo"], TERMS["gd"])
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / f"checkpoint-{failing}").touch()
    done = train(job(model, tmp_path, hparams), TERMS["npo"], TERMS["gd"], save_every=0)
    assert done.figures["steps"] == 6
    assert "No checkpoint can be written" in caplog.text
    assert model_fingerprint(model) == model_fingerprint(undisturbed)


def test_a_folder_holds_what_was_trained_and_can_be_gone_on_from_but_not_taken_back(tmp_path: Path) -> None:
    base, hparams = save_base(tmp_path / "base"), settings("npo_gd", epochs=1)
    result = unlearn(base, FORGET, method="npo_gd", retain=RETAIN, hparams=hparams, out=tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model_fingerprint(loaded) == model_fingerprint(result.model)
    unlearn(tmp_path / "one", FORGET, method="npo_gd", retain=RETAIN, hparams=hparams, out=tmp_path / "two")
    assert [step["method"] for step in read_checkpoint(tmp_path / "two").manifest["steps"]] == ["npo_gd"] * 2
    with pytest.raises(CheckpointError):
        revert_checkpoint(tmp_path / "two", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 2])
def test_a_loss_that_is_not_finite_ends_training_with_the_weights_as_they_were(lora: int) -> None:
    model = tiny_model()
    before, names = model_fingerprint(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(TrainingError, match=r"became nan at step 2 .*Lower learning_rate"):
        run(model, "ga_gd", learning_rate=3e38, max_grad_norm=1e30, lora_rank=lora)
    assert model_fingerprint(model) == before
    assert [name for name, _ in model.named_parameters()] == names


def test_a_batch_that_memory_does_not_hold_says_what_to_do() -> None:
    model = tiny_model()
    before = model_fingerprint(model)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(TrainingError, match=r"does not hold training on 2 pairs .* Lower max_batch_tokens"):
        train(job(model, None, settings("ga_gd")), Term(full, parts=("forget",)), TERMS["gd"])
    assert model_fingerprint(model) == before


def test_an_adapter_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match=r"pip install 'unierase-plugin\[peft\]'"):
        run(tiny_model(), "ga_gd", lora_rank=2)


def test_nothing_to_keep_is_refused_unless_nothing_is_to_be_kept() -> None:
    with pytest.raises(RequestError, match=r"give facts to keep \(retain, --retain\), or set retain_weight to 0"):
        run(tiny_model(), "ga_gd", retain=None)
    assert "retain_term" not in run(tiny_model(), "ga_gd", retain=None, retain_weight=0.0, epochs=1).figures


def test_a_fact_beyond_the_context_is_refused() -> None:
    model = tiny_model(max_position_embeddings=32)
    with pytest.raises(RequestError, match=r"needs \d+ tokens with its answer; the model's context holds 32"):
        run(model, "ga_gd")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("npo_gd", {"beta": 0.0}, "beta = 0.0 must be greater than 0"),
        ("ga_gd", {"batch_size": 0}, "batch_size = 0 must be greater than 0"),
        ("ga_gd", {"retain_weight": -1.0}, "retain_weight = -1.0 must not be negative"),
        ("ga_gd", {"prompt_forms": ("chatty",)}, "must name some of: chat, plain"),
        ("rmu", {"gradient_checkpointing": True}, "rmu runs a part of the model only"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        run(tiny_model(), name, **changes)
