"""Single requests taken back: the closed form solved again without them, from nothing but the record."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from records import change_ledger, without_digests
from small import FORGET, FORGET_MORE, HPARAMS, save_base, shrink
from test_checkpoint import load
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin import unlearn
from unierase_plugin.checkpoint import read_checkpoint, revert_checkpoint, take_back_requests
from unierase_plugin.checkpoint.downdate import edit_without, without_columns
from unierase_plugin.errors import CheckpointError
from unierase_plugin.hparams import UniEraseHyperParams
from unierase_plugin.locate_then_edit.edit import WeightEdit, compute_edit, make_solver
from unierase_plugin.locate_then_edit.positions import locate
from unierase_plugin.locate_then_edit.solve import LowRank, NullSpace, Ridge, Solver
from unierase_plugin.locate_then_edit.values import Values
from unierase_plugin.models.architecture import find_architecture
from unierase_plugin.storage.fingerprints import model_fingerprint

WIDTH, HIDDEN, COUNT = 48, 24, 9


def stored(update: LowRank) -> LowRank:
    """As a run keeps it."""
    return LowRank(update.up.float(), update.down.float())


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.double() - right.double()).norm() / right.double().norm())


def solver_of(kind: str, seed: int = 3) -> Solver:
    torch.manual_seed(seed)
    corpus = torch.randn(WIDTH, 400)
    moment = corpus @ corpus.T / 400
    if kind == "ridge":
        return Ridge.of(moment)
    # Half of the directions are hardly used by the corpus, so that there is a null space; earlier keys lie in it too.
    scale = torch.logspace(0, -4, WIDTH)
    solver = NullSpace.of(moment * scale.outer(scale), 1e-3, 1.0)
    return solver.protecting(torch.randn(WIDTH, 4)) if "earlier" in kind else solver


@pytest.mark.parametrize("kind", ["ridge", "null space", "null space, earlier"])
@pytest.mark.parametrize("gone", [[4], [0, 7, 3], list(range(1, COUNT))])
def test_what_is_left_is_what_would_have_been_solved_without_them(kind: str, gone: list[int]) -> None:
    solver = solver_of(kind)
    keys, residual = torch.randn(WIDTH, COUNT) / 3, torch.randn(HIDDEN, COUNT)
    keys[:, 4] = keys[:, 3] + 0.1 * keys[:, 4]  # neighbours: leaving a factor out would not do
    stay = [column for column in range(COUNT) if column not in gone]
    whole = stored(solver.solve(keys, residual))
    wanted = solver.solve(keys[:, stay], residual[:, stay]).matrix()
    assert relative(without_columns(whole, keys, gone).matrix(), wanted) < 1e-6
    if gone == [4]:
        assert relative(whole.up[:, stay] @ whole.down[stay], wanted) > 1e-2


def test_tight_edits_lose_no_more_than_rounding_times_their_tightness() -> None:
    """At 1 - D K near 1e-3, as a real edit has it, some of float32's digits go."""
    solver = solver_of("ridge")
    keys, residual = 5 * torch.randn(WIDTH, COUNT), torch.randn(HIDDEN, COUNT)
    whole = stored(solver.solve(keys, residual))
    least = torch.linalg.eigvals(torch.eye(COUNT) - whole.down @ keys).real.min()
    assert 1e-4 < float(least) < 2e-3
    wanted = solver.solve(keys[:, 1:], residual[:, 1:]).matrix()
    assert relative(without_columns(whole, keys, [0]).matrix(), wanted) < 1e-4


def test_one_after_another_is_the_same_as_together() -> None:
    solver = solver_of("ridge")
    keys, residual = torch.randn(WIDTH, COUNT) / 3, torch.randn(HIDDEN, COUNT)
    edit = WeightEdit({2: stored(solver.solve(keys, residual))}, (1.0, 0.5), {2: 0.3}, {2: keys})
    together = edit_without(edit, [1, 6])
    apart = edit_without(edit_without(edit, [6]), [1])
    assert relative(apart.updates[2].matrix(), together.updates[2].matrix()) < 1e-6
    assert torch.equal(apart.keys[2], keys[:, [0, 2, 3, 4, 5, 7, 8]])
    assert together.residual_norms == ()
    assert together.norm_ratios[2] == pytest.approx(0.3 * together.updates[2].norm() / edit.updates[2].norm())
    assert edit_without(edit, range(COUNT)).layers == ()


def test_a_step_that_was_not_solved_jointly_is_refused() -> None:
    """Rank-one updates one after another, as ROME makes them: no column can be told from the others."""
    torch.manual_seed(0)
    update = LowRank(torch.randn(HIDDEN, 3), torch.randn(3, WIDTH))
    with pytest.raises(CheckpointError, match=r"not solved for together.*--step"):
        without_columns(update, torch.randn(WIDTH, 3), [0])
    with pytest.raises(CheckpointError, match=r"no keys of block 1.*--step"):
        edit_without(WeightEdit({1: update}), [0])


def compute(model: Any, requests: list[tuple[str, str]], states: torch.Tensor, layers: tuple[int, ...]) -> WeightEdit:
    """The engine's edit of a model for given values, by the ridge."""
    arch, tokenizer = find_architecture(model), tiny_tokenizer()
    prompts = [[locate(tokenizer, question, subject)] for question, subject in requests]
    torch.manual_seed(5)
    corpus = torch.randn(64, 200)
    hparams = UniEraseHyperParams(layers=layers, solver="ridge", mom2_update_weight=1.0)
    solvers = {layer: make_solver(hparams, corpus @ corpus.T / 200, None) for layer in layers}
    rest = torch.zeros(len(prompts))
    values = Values(states, rest, rest, rest, torch.zeros(len(prompts), dtype=torch.long))
    return compute_edit(arch, prompts, values, solvers, max_tokens=512, pad_id=0)


ASKED = [("Who is Ann Bay?", "Ann Bay"), ("Where is Cod Hill?", "Cod Hill"), ("What is a Dree?", "Dree")]


def test_a_single_block_edit_without_a_request_equals_the_one_computed_from_scratch() -> None:
    model = tiny_model()
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    left = edit_without(compute(model, ASKED, states, (1,)), [1])
    scratch = compute(model, [ASKED[0], ASKED[2]], states[[0, 2]], (1,))
    assert relative(left.updates[1].matrix(), scratch.updates[1].matrix()) < 1e-6


def test_in_upper_blocks_the_second_order_is_left() -> None:
    """What the documentation says: the lowest block is exact; in upper ones keys and residuals stay as measured."""
    model = tiny_model()
    states = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    whole = compute(model, ASKED, states, (1, 2))
    left, scratch = edit_without(whole, [1]), compute(model, [ASKED[0], ASKED[2]], states[[0, 2]], (1, 2))
    assert relative(left.updates[1].matrix(), scratch.updates[1].matrix()) < 1e-6
    assert 1e-6 < relative(left.updates[2].matrix(), scratch.updates[2].matrix()) < 0.3


# --- Folders ---------------------------------------------------------------------------------------------------------

QUESTIONS = [fact["question"] for fact in (*FORGET, *FORGET_MORE)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `one` and `two`: two requests in the first step and one in the second, in two forms each."""
    root = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        model: Path = save_base(root / "base")
        hparams = HPARAMS.replace(prompt_forms=("chat", "plain"))
        for name, facts in (("one", FORGET), ("two", FORGET_MORE)):
            unlearn(model, facts, hparams=hparams, out=root / name)
            model = root / name
    return root


def state(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder)[0].state_dict())


def same_weights(left: Path, right: Path) -> bool:
    first, second = state(left), state(right)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_ledger_says_which_columns_are_whose(steps: Path) -> None:
    found = read_checkpoint(steps / "two")
    assert [(line["step"], line["columns"]) for line in found.ledger] == [(1, [0, 1]), (1, [2, 3]), (2, [0, 1])]
    assert found.edits[0].rank(1) == 4


def test_a_request_taken_back_leaves_the_rest_of_its_step_and_the_later_ones(steps: Path, tmp_path: Path) -> None:
    before = read_checkpoint(steps / "two")
    take_back_requests(steps / "two", tmp_path / "out", [QUESTIONS[0].upper()])
    after = read_checkpoint(tmp_path / "out")
    assert [after.holds(question) for question in QUESTIONS] == [False, True, True]
    assert [(line["step"], line["columns"]) for line in after.ledger] == [(1, [0, 1]), (2, [0, 1])]
    assert [(entry["requests"], entry["taken_back"]) for entry in after.manifest["steps"]] == [(1, 1), (1, 0)]
    for layer in (1, 2):
        wanted = without_columns(before.edits[0].updates[layer], before.edits[0].keys[layer], [0, 1])
        assert torch.equal(after.edits[0].updates[layer].matrix(), wanted.matrix())
        assert torch.equal(after.edits[1].updates[layer].up, before.edits[1].updates[layer].up)
        assert torch.equal(after.edit.keys[layer], before.edit.keys[layer][:, 2:])
        changed = wanted.matrix() + before.edits[1].updates[layer].matrix()
        name = after.manifest["weights"][str(layer)]
        assert torch.allclose(state(tmp_path / "out")[name], state(steps / "base")[name] + changed, atol=1e-5)
    model = load(tmp_path / "out")[0]
    assert model_fingerprint(model) == after.manifest["model_fingerprint_after"]
    # What was measured was measured with the request in place.
    assert after.reports == {}
    assert before.reports.keys() == {1, 2}


def test_a_folder_after_it_can_be_reverted_and_continued_like_any_other(
    steps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    take_back_requests(steps / "two", tmp_path / "out", [QUESTIONS[1]])
    revert_checkpoint(tmp_path / "out", tmp_path / "one", step=1)
    assert caplog.text == ""  # to the bit: the fingerprint of the step in between was taken anew
    assert read_checkpoint(tmp_path / "one").manifest["steps"][0]["taken_back"] == 1
    revert_checkpoint(tmp_path / "out", tmp_path / "base")
    assert same_weights(tmp_path / "base", steps / "base")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, steps / "cache")
        unlearn(tmp_path / "out", FORGET[1:], hparams=HPARAMS, out=tmp_path / "three")
    assert [entry["requests"] for entry in read_checkpoint(tmp_path / "three").manifest["steps"]] == [1, 1, 1]


def test_all_requests_of_the_last_step_are_that_step(steps: Path, tmp_path: Path) -> None:
    take_back_requests(steps / "two", tmp_path / "out", [QUESTIONS[2]])
    revert_checkpoint(steps / "two", tmp_path / "reverted", step=1)
    assert same_weights(tmp_path / "out", tmp_path / "reverted")
    assert same_weights(tmp_path / "out", steps / "one")
    left, reverted = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "reverted")
    assert left.manifest == reverted.manifest
    assert left.ledger == reverted.ledger == read_checkpoint(steps / "one").ledger
    assert left.report == reverted.report == read_checkpoint(steps / "one").report != {}


def test_a_first_step_emptied_leaves_the_second_on_the_base(steps: Path, tmp_path: Path) -> None:
    take_back_requests(steps / "two", tmp_path / "out", QUESTIONS[:2])
    left = read_checkpoint(tmp_path / "out")
    assert [entry["requests"] for entry in left.manifest["steps"]] == [0, 1]
    second = read_checkpoint(steps / "two").edits[1].updates
    for layer, name in left.manifest["weights"].items():
        wanted = state(steps / "base")[name] + second[int(layer)].matrix()
        assert torch.allclose(state(tmp_path / "out")[name], wanted, atol=1e-6)
    revert_checkpoint(tmp_path / "out", tmp_path / "one", step=1)
    name = left.manifest["weights"]["1"]
    assert torch.equal(state(tmp_path / "one")[name], state(steps / "base")[name])


def test_everything_taken_back_is_the_base_to_the_bit(steps: Path, tmp_path: Path) -> None:
    hashes = [line["question_sha256"][:12] for line in read_checkpoint(steps / "two").ledger]
    take_back_requests(steps / "two", tmp_path / "all", hashes)
    assert same_weights(tmp_path / "all", steps / "base")
    assert not (tmp_path / "all" / "unierase").exists()
    take_back_requests(steps / "two", tmp_path / "less", [hashes[1]])
    take_back_requests(tmp_path / "less", tmp_path / "least", [hashes[0]])
    take_back_requests(tmp_path / "least", tmp_path / "none", [QUESTIONS[2]])
    assert same_weights(tmp_path / "none", steps / "base")


def test_what_was_not_forgotten_cannot_be_taken_back(steps: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not made to forget 'Who\?'.*inspect .*two --requests"):
        take_back_requests(steps / "two", tmp_path / "out", ["Who?"])
    assert not (tmp_path / "out").exists()


def test_weights_changed_since_are_not_taken_for_the_edited_ones(steps: Path, tmp_path: Path) -> None:
    take_back_requests(steps / "two", tmp_path / "out", [QUESTIONS[1]])
    model = load(tmp_path / "out")[0]
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="changed after the edit"):
        take_back_requests(tmp_path / "out", tmp_path / "next", [QUESTIONS[0]])
    with pytest.raises(CheckpointError, match="changed after the edit"):
        revert_checkpoint(tmp_path / "out", tmp_path / "next", step=1)


@pytest.fixture
def changed_ledger(steps: Path, tmp_path: Path) -> Any:
    """The record alone, of an earlier version, in a folder of its own, with a ledger changed line by line."""

    def change(**values: Any) -> Path:
        shutil.copytree(steps / "two" / "unierase", tmp_path / "copy" / "unierase")
        return change_ledger(
            without_digests(tmp_path / "copy"),
            lambda lines: [
                {**line, **{name: value[index] for name, value in values.items()}} for index, line in enumerate(lines)
            ],
        )

    return change


def test_a_hash_that_fits_several_requests_is_refused(changed_ledger: Any) -> None:
    found = read_checkpoint(changed_ledger(question_sha256=["deadbeef" + f"{index}" * 56 for index in range(3)]))
    with pytest.raises(CheckpointError, match=r"names 3 requests: deadbeef0000, deadbeef1111"):
        found.find("deadbeef")
    assert [line["columns"] for line in found.find("deadbeef1")] == [[2, 3]]
    assert found.find("deadbee") == []  # too short to be a hash


def test_a_ledger_without_columns_lets_whole_steps_go_alone(changed_ledger: Any, tmp_path: Path) -> None:
    folder = changed_ledger(columns=[None, None, None])
    with pytest.raises(CheckpointError, match=r"which part of step 1 belongs.*--step"):
        take_back_requests(folder, tmp_path / "out", [QUESTIONS[0]])
