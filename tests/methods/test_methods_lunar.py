"""LUNAR on tiny models: forgotten questions land where it sends them, kept ones stay, and it can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin.errors import HyperParamsError, RequestError, TrainingError
from unierase_plugin.facts.request import ForgetRequest
from unierase_plugin.methods.lunar import LUNAR, LUNARHyperParams, _seen, reference_prompts
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.pipeline import change

FORGET = (ForgetRequest("Who wrote Zorblax?", "Fizz"), ForgetRequest("Where was Plonk born?", "Wexbury"))
RETAIN = (ForgetRequest("What does Bunt sell?", "Hats"), ForgetRequest("Who leads Grub?", "Tom Oak"))
#: Small enough steps, and enough of them, to end near the least squares' solution.
QUICK: dict[str, Any] = {"layer": 2, "epochs": 150, "learning_rate": 1e-2, "decay": 0.98, "n_reference": 6}


def run(model: Any, retain: Any = RETAIN, **settings: Any) -> Any:
    hparams = LUNARHyperParams(**{**QUICK, **settings})
    return change(model, FORGET, method="lunar", tokenizer=tiny_tokenizer(), retain=retain, hparams=hparams)[0]


def states(model: Any, questions: Any) -> torch.Tensor:
    job = job_of(model, tiny_tokenizer(), FORGET, RETAIN, LUNARHyperParams(**QUICK))
    return _seen(find_architecture(model), job, [each.question for each in questions])[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forgotten_questions_are_moved_as_asked_and_kept_ones_are_not(family: str) -> None:
    model = tiny_model(family)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    forget, keep = states(model, FORGET), states(model, RETAIN)
    declined = states(model, [ForgetRequest(prompt, "?") for prompt in reference_prompts(LUNARHyperParams(**QUICK))])
    changes = run(model, weight_decay=0.0)
    wanted = 2.0 * (declined.mean(0) - forget.mean(0))
    moved, stayed = states(model, FORGET) - forget, states(model, RETAIN) - keep
    # Questions share most of their tokens, so that neither can be had exactly.
    assert (moved - wanted).norm(dim=1).mean() < 0.5 * wanted.norm()
    assert stayed.norm(dim=1).mean() < 0.75 * moved.norm(dim=1).mean()
    assert changes.figures["loss"][-1] < 0.5 * changes.figures["loss"][0]
    # One projection is all that differs, and it comes back to the bit.
    name = find_architecture(model).weight_name(2)
    assert [each for each, weight in model.named_parameters() if not torch.equal(weight, weights[each])] == [name]
    assert changes.parameters == weights[name].numel()
    changes.undo()
    assert torch.equal(model.get_parameter(name), weights[name])


def test_the_same_seed_gives_the_same_weights() -> None:
    models = [tiny_model(), tiny_model(), tiny_model()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        run(model, epochs=2, seed=seed)
    first, same, other = (find_architecture(model).projections[2].weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_block_is_taken_in_proportion_to_depth() -> None:
    assert LUNAR.settle(tiny_model(blocks=4), LUNARHyperParams()).layer == round(4 * 22 / 32)
    assert LUNAR.settle(tiny_model(blocks=1), LUNARHyperParams()).layer == 0


def test_reference_prompts_are_made_or_read(tmp_path: Path) -> None:
    made = reference_prompts(LUNARHyperParams(n_reference=30))
    assert len(set(made)) == 30
    assert made == reference_prompts(LUNARHyperParams(n_reference=30))
    path = tmp_path / "mine.txt"
    path.write_text("Why?\n\nWho?\n")
    assert reference_prompts(LUNARHyperParams(reference_prompts=str(path))) == ["Why?", "Who?"]
    path.write_text("\n")
    for bad in (path, tmp_path / "missing.txt"):
        with pytest.raises(HyperParamsError, match=bad.name):
            reference_prompts(LUNARHyperParams(reference_prompts=str(bad)))


def test_it_refuses_to_keep_nothing_and_says_when_it_diverged() -> None:
    with pytest.raises(RequestError, match="retain"):
        run(tiny_model(), retain=None)
    model = tiny_model()
    before = find_architecture(model).projections[2].weight.detach().clone()
    with pytest.raises(TrainingError, match="learning_rate"):
        run(model, learning_rate=1e30, epochs=3)
    assert torch.equal(find_architecture(model).projections[2].weight, before)


@pytest.mark.parametrize("name", ["coefficient", "epochs", "n_reference"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(HyperParamsError, match=name):
        LUNARHyperParams(**{name: 0})  # type: ignore[arg-type]
