"""The whole method on tiny models: what it leaves, what it reuses, and how it goes on after being stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import scipy.linalg
import torch
from small import FORGET, FORGET_MORE, FORGET_OTHERS, HPARAMS, RETAIN, SHORT, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from unierase_plugin import UniEraseError, UniEraseHyperParams, UnlearnResult, pipeline, unlearn
from unierase_plugin.checkpoint import folder as folder_module
from unierase_plugin.checkpoint import read_checkpoint, revert_checkpoint
from unierase_plugin.cli.console import Screen
from unierase_plugin.cli.run import _print_figures
from unierase_plugin.errors import CheckpointError, HyperParamsError, TokenError
from unierase_plugin.hparams import shipped_hparams
from unierase_plugin.locate_then_edit import edit
from unierase_plugin.methods import neighbours as keeping
from unierase_plugin.methods.editing import engine as erasure
from unierase_plugin.methods.editing import goals, protection
from unierase_plugin.methods.editing.layers import default_layers
from unierase_plugin.methods.removal.method import RemovalHyperParams
from unierase_plugin.models import generate
from unierase_plugin.models.auto_class import auto_class
from unierase_plugin.session import choose_hparams
from unierase_plugin.statistics import collection as second_moment
from unierase_plugin.storage.cache import Store
from unierase_plugin.storage.fingerprints import model_fingerprint, tokenizer_fingerprint
from unierase_plugin.storage.tensor_files import read_tensors

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])
#: What is kept when it ends, in order, and the function that computes it.
KEPT = {
    "before": "answers",
    "statistics": "add_sequences",
    "tokens": "learn_token",
    "declined": "second_moments",
    "retain": "second_moments",
    "values": "optimise_values",
    "edit": "compute_edit",
    "after": "answers",
}


class KilledError(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run of `erase` with nothing in the cache."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, folder / "cache")
        erase(base, folder / "out")
    return folder / "out"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each expensive function has run."""
    counted: Counter[str] = Counter()

    def count(name: str) -> None:
        module = next(
            module for module in (erasure, goals, protection, second_moment, pipeline.run) if hasattr(module, name)
        )
        original = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for name in set(KEPT.values()):
        count(name)
    return counted


def erase(model: Any, out: Path | None = None, forget: Any = FORGET, **changes: Any) -> UnlearnResult:
    arguments = {"retain": RETAIN, "hparams": HPARAMS, "out": out, **changes}
    return unlearn(model, forget, **arguments)


def stop_after(patch: pytest.MonkeyPatch, kind: str, stop: Callable[[], Any]) -> None:
    """Calls `stop` as soon as the results of that kind are kept."""
    original = Store.put

    def stopping(where: Store, found: str, *rest: Any) -> None:
        original(where, found, *rest)
        if found == kind:
            stop()

    patch.setattr(Store, "put", stopping)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def loaded(folder: Path, attention: str = "sdpa") -> tuple[Any, Any]:
    kind = auto_class(AutoConfig.from_pretrained(folder))
    model = kind.from_pretrained(folder, dtype="auto", attn_implementation=attention)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_folder_loads_as_any_other_and_equals_the_model_in_memory(base: Path, tmp_path: Path) -> None:
    result = erase(base, tmp_path / "out")
    model, tokenizer = loaded(tmp_path / "out")
    assert torch.equal(logits(model), logits(result.model))
    assert not torch.equal(logits(model)[..., :260], logits(loaded(base)[0]))
    assert tokenizer("a<unlearn_0>b", add_special_tokens=False)["input_ids"][1] == result.token.id == 260
    assert result.folder == tmp_path / "out"


def test_the_report_has_what_other_programs_read(undisturbed: Path) -> None:
    report = json.loads((undisturbed / "unierase" / "report.json").read_text())
    assert report["method"] == "unierase"
    assert report["model"].endswith("model")
    assert (report["n_forget"], report["n_retain"]) == (2, 1)
    assert {"answered_before", "answered_after", "token_first_after", "idk_after"} <= report["forget"].keys()
    assert {"answered_before", "answered_after"} <= report["retain"].keys()
    assert report["perplexity"].keys() == {"before", "after"}
    assert report["update_norm_ratio"].keys() == {"1", "2"}
    assert all(0 < ratio < 10 for ratio in report["update_norm_ratio"].values())
    assert report["seconds"].keys() == {"token", "statistics", "values", "edit", "evaluate"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["peak_memory_bytes"] > 1e6


@pytest.mark.parametrize(("solver", "reaches"), [("exact", True), ("ridge", False)])
def test_an_edit_that_does_not_reach_its_values_says_so(
    base: Path, solver: str, reaches: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default weight of the corpus holds a tiny model's edit back."""
    result = erase(base, hparams=HPARAMS.replace(solver=solver), retain=None)
    figures = result.report.edit
    left = figures["residual_norms"][-1] / figures["residual_norms"][0]
    assert figures["residual_left"] == pytest.approx(left)
    assert (left < 0.5) == reaches
    assert ("The edit does not reach its values" in caplog.text) != reaches
    assert reaches or f"{100 * left:.0f} % of the way is left" in caplog.text
    _print_figures(Screen(), result)
    assert f"{100 * left:.1f} %" in capsys.readouterr().out


def test_the_share_of_changed_parameters_is_that_of_the_weights_that_differ(base: Path, undisturbed: Path) -> None:
    before, after = loaded(base)[0], loaded(undisturbed)[0]
    old = state(before)
    changed = sum(
        int((weight != old[name]).sum()) if weight.shape == old[name].shape else int(weight[260:].numel())
        for name, weight in state(after).items()
    )
    share = json.loads((undisturbed / "unierase" / "report.json").read_text())["parameters_changed"]
    assert share == pytest.approx(changed / sum(weight.numel() for weight in after.parameters()), rel=0.01)


def test_what_is_to_be_kept_is_judged_apart(base: Path) -> None:
    report = erase(base, judged=1).report
    assert [outcome.question for outcome in report.forget] == [FORGET[0]["question"]]
    assert [outcome.question for outcome in report.retain] == [RETAIN[0]["question"]]


def test_a_run_without_facts_to_keep(base: Path) -> None:
    figures = erase(base, retain=None).report.as_dict()
    assert figures["n_retain"] == 0
    assert figures["retain"]["rouge_l_recall_after"] is None
    # What follows the token is kept all the same, unless nothing is to be.
    assert figures["edit"]["retain_tokens"] > 0
    unguarded = erase(base, retain=None, hparams=HPARAMS.replace(retain_update_weight=0)).report.as_dict()
    assert unguarded["edit"]["retain_tokens"] == 0


NEIGHBOURLY = HPARAMS.replace(retain_neighbours=2, retain_key_weight=5.0)


def speaking(patch: pytest.MonkeyPatch, says: str = "It is a thing.") -> None:
    """Has the model answer neighbours fluently, as no random one does."""
    patch.setattr(keeping, "decode_answer", lambda *args: says)


def test_neighbours_that_the_model_answers_are_kept_as_well(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(monkeypatch)
    alone, joined = (erase(base, hparams=hparams) for hparams in (HPARAMS, NEIGHBOURLY))
    found = joined.changes.neighbours
    assert alone.changes.neighbours == ()
    assert {fact.answer for fact in found} == {"It is a thing."}
    assert len(found) == 2 * len(FORGET)
    assert not {fact.question for fact in found} & {fact["question"] for fact in FORGET}
    before, after = (result.report.as_dict()["edit"] for result in (alone, joined))
    assert (before["neighbours"], after["neighbours"]) == (0, len(found))
    assert after["retain_tokens"] > before["retain_tokens"]
    assert joined.report.seconds["neighbours"] > 0
    assert "neighbours" not in alone.report.seconds


def test_an_answer_that_is_a_sentence_has_no_neighbours(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(monkeypatch)
    first = {**FORGET[0], "answer": "It is by one of four people."}
    result = unlearn(base, [first, *FORGET[1:]], retain=RETAIN, hparams=NEIGHBOURLY)
    assert {str(fact.case_id).rpartition(" ")[2] for fact in result.changes.neighbours} == {"1"}
    assert len(result.changes.neighbours) == 2


def test_a_removal_keeps_neighbours_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(monkeypatch)
    alone, joined = (
        unlearn(
            base,
            FORGET,
            retain=RETAIN,
            method="removal",
            hparams=RemovalHyperParams(
                retain_neighbours=wanted, removal_passes=1, removal_rank=4, removal_keep_weight=0.1
            ),
        )
        for wanted in (0, 2)
    )
    before, after = (result.report.as_dict()["edit"] for result in (alone, joined))
    assert (before["neighbours"], after["neighbours"]) == (0, 2 * len(FORGET))
    assert after["removal"]["kept_facts"] == before["removal"]["kept_facts"]
    assert (before["removal"]["neighbours"], after["removal"]["neighbours"]) == (0, 2 * len(FORGET))
    assert len(joined.changes.neighbours) == 2 * len(FORGET)


def test_the_report_says_how_far_what_is_kept_moved(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(monkeypatch)
    light, heavy = (
        erase(base, hparams=NEIGHBOURLY.replace(retain_key_weight=weight)).report.as_dict()["edit"]["protected"]
        for weight in (1e-3, 1e9)
    )
    assert light["keys"] == heavy["keys"] > len(RETAIN)
    assert light["largest"].keys() == light["median"].keys() == {"1", "2"}
    assert all(heavy["largest"][layer] < 1e-3 < light["largest"][layer] for layer in ("1", "2"))
    names = {each["fact"] for each in light["worst"]}
    assert names <= {"request-0", *(f"neighbour {way} of {at}" for way in ("relation", "subject") for at in (0, 1))}
    unweighed = erase(base, hparams=NEIGHBOURLY.replace(retain_key_weight=0.0)).report.as_dict()["edit"]
    assert "protected" not in unweighed


def test_neighbours_found_before_a_stop_are_those_found_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaking(monkeypatch)
    erase(base, tmp_path / "whole", hparams=NEIGHBOURLY)
    with monkeypatch.context() as patch:
        stop_after(patch, "values", raising(KilledError()))
        with pytest.raises(KilledError):
            erase(base, tmp_path / "stopped", hparams=NEIGHBOURLY)
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("kept/*") if path.is_file())
    assert kept
    # They name what is to be forgotten, so that only the owner may read them.
    assert b"Zorblax" in kept
    assert [folder.stat().st_mode & 0o777 for folder in tmp_path.glob(".*.work/*")] == [0o700]
    # What is kept is read: the model would say otherwise now.
    speaking(monkeypatch, "That is another matter altogether.")
    result = erase(base, tmp_path / "stopped", hparams=NEIGHBOURLY)
    assert {fact.answer for fact in result.changes.neighbours} == {"It is a thing."}
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_mean_log_likelihoods_are_those_of_each_sequence_alone(base: Path) -> None:
    model, tokenizer = loaded(base)
    sequences = [[5, 6, 7, 8, 9], [5, 6, 7]]
    found = generate.mean_log_likelihoods(model, tokenizer, sequences, [2, 1])
    for ids, start, got in zip(sequences, [2, 1], found, strict=True):
        with torch.no_grad():
            said = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [float(said[at - 1, ids[at]]) for at in range(start, len(ids))]
        assert got == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("rows", [260, 261, 275], ids=["full", "one to spare", "padded"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("remove", [False, True])
def test_a_run_that_learns_the_token_writes_what_one_that_finds_it_does(
    tied: bool, rows: int, remove: bool, tmp_path: Path
) -> None:
    """The same bytes, and the same way back: a learned row must not be taken for the model's own."""
    model, tokenizer = tiny_model(tied=tied, vocabulary=rows), tiny_tokenizer()
    base = save_base(tmp_path / "base", model, tokenizer)
    few = {
        "removal_passes": 1,
        "removal_decline_passes": 1,
        "removal_keep_weight": 0.1,
        "removal_ridge": 0.3,
        "removal_output_ridge": 0.3,
    }
    hparams = HPARAMS.replace(remove=remove, **few)
    folders = [tmp_path / name for name in ("cold", "warm")]
    results = [erase(base, folder, hparams=hparams) for folder in folders]
    cold, warm = folders
    assert weights(cold) == weights(warm)
    (found, told), (wanted, said) = (read_tensors(folder / "unierase/edits.safetensors") for folder in folders)
    assert told == said
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for folder, result in zip(folders, results, strict=True):
        revert_checkpoint(folder, tmp_path / f"{folder.name}-back")
        assert weights(tmp_path / f"{folder.name}-back") == weights(base)
        result.revert()
        assert state(result.model).keys() == state(model).keys()
        assert all(
            torch.equal(now, before)
            for now, before in zip(state(result.model).values(), state(model).values(), strict=True)
        )


def test_nothing_is_left_beside_the_folder(base: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    erase(base, place / "out")
    assert os.listdir(place) == ["out"]


def test_without_a_folder_nothing_but_the_cache_is_written(base: Path, tmp_path: Path) -> None:
    assert erase(base).folder is None
    assert os.listdir(tmp_path) == ["cache"]


def test_progress_ends_every_phase(base: Path, tmp_path: Path) -> None:
    seen: dict[str, float] = {}
    erase(base, tmp_path / "out", progress=lambda phase, share, note: seen.update({phase: share}))
    assert list(seen) == ["load", "before", "statistics", "token", "values", "edit", "after", "save"]
    assert set(seen.values()) == {1.0}


# --- models in memory ------------------------------------------------------------------------------------------------


def test_a_loaded_model_gives_the_same_bytes_as_its_folder(base: Path, undisturbed: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(base)
    result = erase(model, tmp_path / "out", tokenizer=tokenizer)
    assert result.model is model
    assert weights(tmp_path / "out") == weights(undisturbed)


def test_a_loaded_model_keeps_its_mode_and_its_gradients(base: Path) -> None:
    model, tokenizer = loaded(base)
    model.train()
    frozen = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(frozen).requires_grad_(False)
    erase(model, tokenizer=tokenizer)
    assert model.training
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {frozen}


def test_a_loaded_model_needs_its_tokenizer_and_stays_where_it_is(base: Path) -> None:
    model, tokenizer = loaded(base)
    with pytest.raises(UniEraseError, match="needs its tokenizer"):
        erase(model)
    with pytest.raises(UniEraseError, match="Move the loaded model yourself"):
        erase(model, tokenizer=tokenizer, device="cpu")
    assert len(tokenizer) == 260


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether a model holds these weights and no others, to the bit."""
    now = state(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 60], ids=["a new row", "a padding row"])
def test_revert_gives_model_and_tokenizer_back_to_the_bit(tied: bool, padding: int) -> None:
    model, tokenizer = tiny_model(tied=tied), tiny_tokenizer()
    if padding:
        model.resize_token_embeddings(len(tokenizer) + padding, mean_resizing=False)
    before, words = state(model), tokenizer_fingerprint(tokenizer)
    result = erase(model, tokenizer=tokenizer)
    projections = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    assert not any(torch.equal(model.get_parameter(name), before[name]) for name in projections)
    assert len(tokenizer) == 261
    result.revert()
    assert same(model, before)
    assert (len(tokenizer), tokenizer_fingerprint(tokenizer)) == (260, words)
    assert "<unlearn_0>" not in tokenizer.get_vocab()
    assert model.config.vocab_size == 260 + padding
    # Control: the way is free for another run, with the same end.
    again = erase(model, tokenizer=tokenizer)
    assert again.edit is not None
    assert result.edit is not None
    assert torch.equal(again.edit.updates[1].up, result.edit.updates[1].up)


# --- going on in memory -----------------------------------------------------------------------------------------------


def test_going_on_from_a_result_is_going_on_from_its_folder(base: Path, undisturbed: Path, tmp_path: Path) -> None:
    first = erase(base, tmp_path / "first")
    first_weight = state(first.model)["model.layers.1.mlp.down_proj.weight"]
    second = erase(first, tmp_path / "memory", FORGET_MORE)
    erase(undisturbed, tmp_path / "folder", FORGET_MORE)
    memory, folder = (state(loaded(tmp_path / name)[0]) for name in ("memory", "folder"))
    # Not to the bit: a processor may round a product by where in memory its factors lie.
    for name, weight in folder.items():
        torch.testing.assert_close(memory[name], weight, rtol=0, atol=1e-6)
    assert not torch.allclose(memory["model.layers.1.mlp.down_proj.weight"], first_weight, atol=1e-4)
    assert len(second.history.edits) == len(read_checkpoint(tmp_path / "memory").edits) == 2


def test_steps_in_memory_are_taken_back_one_by_one(base: Path) -> None:
    model, tokenizer = loaded(base)
    before = state(model)
    first = erase(model, tokenizer=tokenizer)
    between = state(model)
    second = erase(first, forget=FORGET_MORE)
    assert not same(model, between)
    second.revert()
    assert same(model, between)
    first.revert()
    assert same(model, before)


def test_steps_that_were_not_written_cannot_be_gone_on_from_in_a_folder(base: Path, tmp_path: Path) -> None:
    first = erase(base)
    with pytest.raises(CheckpointError, match="Give out= to the first"):
        erase(first, tmp_path / "out", FORGET_MORE)


def test_a_change_without_judging_is_the_same_change(base: Path) -> None:
    result = erase(base)
    model, tokenizer = loaded(base)
    _, steps = pipeline.change(model, FORGET, tokenizer=tokenizer, retain=RETAIN, hparams=HPARAMS)
    assert same(model, state(result.model))
    pipeline.change(model, FORGET_MORE, tokenizer=tokenizer, retain=RETAIN, hparams=HPARAMS, history=steps)
    assert same(model, state(erase(result, forget=FORGET_MORE).model))


@pytest.mark.parametrize("fails", ["judge", "save"])
@pytest.mark.parametrize("error", [UniEraseError("no"), KeyboardInterrupt()])
def test_what_fails_after_the_edit_takes_it_back(
    fails: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    before = state(model)
    monkeypatch.setattr(*(pipeline.run, "judge") if fails == "judge" else (folder_module, "save_model"), raising(error))
    with pytest.raises(type(error)):
        erase(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    assert same(model, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("phase", ["learn_token", "optimise_values", "add_updates"])
def test_what_fails_after_the_token_came_lets_it_go(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before, words = state(model), tokenizer_fingerprint(tokenizer)
    monkeypatch.setattr(goals if phase == "learn_token" else erasure, phase, raising(UniEraseError("no")))
    with pytest.raises(UniEraseError, match="no"):
        erase(model, tokenizer=tokenizer)
    assert same(model, before)
    assert tokenizer_fingerprint(tokenizer) == words


# --- what is used again ----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(base: Path, undisturbed: Path, tmp_path: Path) -> None:
    erase(base, tmp_path / "again")
    erase(base, tmp_path / "other", seed=1)
    assert weights(tmp_path / "again") == weights(undisturbed) != weights(tmp_path / "other")


def test_a_cached_token_and_statistics_give_the_same_bytes(base: Path, undisturbed: Path, tmp_path: Path) -> None:
    erase(base, forget=FORGET_MORE)
    erase(base, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(undisturbed)


def test_other_requests_use_the_token_and_the_statistics_again(base: Path, calls: Counter[str]) -> None:
    erase(base)
    assert calls == Counter(KEPT.values())
    calls.clear()
    erase(base, forget=FORGET_OTHERS, retain=None)
    assert calls == Counter(["answers", "optimise_values", "compute_edit", "answers"])


@pytest.mark.parametrize(
    ("change", "learned", "counted"),
    [
        ({"hparams": HPARAMS.replace(seed=1)}, 1, 1),
        ({"hparams": HPARAMS.replace(layers=(0, 1))}, 1, 1),
        ({"hparams": HPARAMS.replace(token_lr=0.05)}, 1, 0),
        ({"hparams": HPARAMS.replace(unlearning_token="<gone>")}, 1, 0),
        ({"hparams": HPARAMS.replace(mom2_n_samples=5)}, 0, 1),
        ({"hparams": HPARAMS.replace(mom2_dtype="float64")}, 0, 1),
        ({"hparams": HPARAMS.replace(v_lr=0.3, v_num_grad_steps=2)}, 0, 0),
        # The size of the coming edit sizes the noise that the token is trained under.
        ({"hparams": HPARAMS.replace(clamp_norm_factor=0.1)}, 1, 0),
    ],
)
def test_what_a_result_depends_on_makes_another_one(
    base: Path, calls: Counter[str], change: dict[str, Any], learned: int, counted: int
) -> None:
    erase(base, retain=None)
    calls.clear()
    erase(base, retain=None, **change)
    assert (calls["learn_token"], calls["add_sequences"]) == (learned, counted)


def test_another_model_under_the_same_name_learns_its_own(tmp_path: Path, calls: Counter[str]) -> None:
    for seed in (0, 1):
        erase(save_base(tmp_path / "model", tiny_model(seed=seed)), retain=None)
    assert (calls["learn_token"], calls["add_sequences"]) == (2, 2)


def test_a_corpus_file_that_changes_is_read_again(base: Path, tmp_path: Path, calls: Counter[str]) -> None:
    corpus = tmp_path / "corpus.txt"
    for text in ("Some text.\n\nMore of it.", "Some text.\n\nMore of it.", "Another text."):
        corpus.write_text(text)
        erase(base, retain=None, corpus=str(corpus))
    assert calls["add_sequences"] == 2


# --- going on after being stopped ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEPT)
def test_a_stopped_run_goes_on_without_repeating_what_was_finished(
    kind: str, base: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, kind, raising(KilledError()))
        with pytest.raises(KilledError):
            erase(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    calls.clear()
    erase(base, tmp_path / "out")
    kinds = list(KEPT)
    assert calls == Counter(KEPT[later] for later in kinds[kinds.index(kind) + 1 :])
    assert weights(tmp_path / "out") == weights(undisturbed)
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]


@pytest.mark.parametrize("kind", ["tokens", "after"])
def test_a_killed_process_leaves_what_it_had_finished(
    kind: str, base: Path, undisturbed: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    place = tmp_path / "place"
    script = (
        "import os, signal, sys, pathlib, pytest\n"
        "import small, test_pipeline as t\n"
        "base, place, cache, kind = sys.argv[1:]\n"
        "patch = pytest.MonkeyPatch()\n"
        "small.shrink(patch, pathlib.Path(cache))\n"
        "t.stop_after(patch, kind, lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
        "t.erase(base, pathlib.Path(place) / 'out')\n"
    )
    arguments = [str(base), str(place), str(tmp_path / "cache"), kind]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    erase(str(base), place / "out")
    kinds = list(KEPT)
    assert calls == Counter(KEPT[later] for later in kinds[kinds.index(kind) + 1 :])
    assert weights(place / "out") == weights(undisturbed)
    assert os.listdir(place) == ["out"]


def test_kept_results_of_other_settings_are_not_taken(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, "after", raising(KilledError()))
        with pytest.raises(KilledError):
            erase(base, tmp_path / "out")
    calls.clear()
    erase(base, tmp_path / "out", hparams=HPARAMS.replace(v_lr=0.3))
    assert calls == Counter(["answers", "second_moments", "optimise_values", "compute_edit", "answers"])


def test_damaged_kept_results_are_computed_again(
    base: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, "values", raising(KilledError()))
        with pytest.raises(KilledError):
            erase(base, tmp_path / "out")
    (kept,) = tmp_path.glob(".out.work/*/values/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    calls.clear()
    erase(base, tmp_path / "out")
    assert calls["optimise_values"] == 1
    assert weights(tmp_path / "out") == weights(undisturbed)


@pytest.mark.parametrize("when", ["before writing", "while writing"])
def test_a_full_disk_at_the_end_costs_no_work(
    when: str, base: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Counter[str]
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    earlier = (out / "unierase" / "manifest.json").read_text()
    with monkeypatch.context() as patch:
        if when == "before writing":
            # There was room when the run began, and once the model was there.
            free = iter((10**12, 10**12))
            patch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=next(free, 1000)))
        else:
            patch.setattr(folder_module, "save_model", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(CheckpointError, match=r"could not be written .* Free some room"):
            erase(base, out, overwrite=True)
    assert (out / "unierase" / "manifest.json").read_text() == earlier
    calls.clear()
    erase(base, out, overwrite=True)
    assert not calls
    assert (out / "unierase" / "manifest.json").read_text() != earlier
    assert weights(out) == weights(undisturbed)


# --- further steps ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, folder / "cache")
        erase(undisturbed, folder / "out", FORGET_MORE, hparams=HPARAMS.replace(layers=(0, 1)), retain=None)
    return folder / "out"


def test_a_second_step_goes_on_from_the_first(base: Path, undisturbed: Path, two_steps: Path) -> None:
    first, second = read_checkpoint(undisturbed), read_checkpoint(two_steps)
    assert [step["requests"] for step in second.manifest["steps"]] == [2, 1]
    assert [line["step"] for line in second.ledger] == [1, 1, 2]
    assert second.manifest["model"] == first.manifest["model"] == str(base)
    assert second.manifest["layers"] == [0, 1, 2]
    assert second.holds(FORGET[0]["question"])
    assert second.holds(FORGET_MORE[0]["question"])
    assert first.token is not None
    assert second.token is not None
    assert torch.equal(first.token.input_row, second.token.input_row)


def test_a_second_step_keeps_the_token_and_protects_the_earlier_keys(
    undisturbed: Path, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = edit.make_solver

    def watched(hparams: Any, corpus: Any, retain: Any, earlier: Any, *more: Any, **named: Any) -> Any:
        seen.append(earlier)
        return original(hparams, corpus, retain, earlier, *more, **named)

    monkeypatch.setattr(erasure, "make_solver", watched)
    erase(undisturbed, tmp_path / "out", FORGET_MORE)
    assert calls["learn_token"] == 0
    keys = read_checkpoint(undisturbed).edit.keys
    assert len(seen) == 2
    assert all(torch.equal(earlier, keys[layer]) for layer, earlier in zip((1, 2), seen, strict=True))
    assert len(loaded(tmp_path / "out")[1]) == 261


def test_every_step_uses_the_statistics_from_before_the_first(
    base: Path, undisturbed: Path, tmp_path: Path, calls: Counter[str]
) -> None:
    erase(base)  # fills this test's cache
    calls.clear()
    erase(undisturbed, tmp_path / "two", FORGET_MORE, retain=None)
    erase(tmp_path / "two", tmp_path / "three", FORGET_OTHERS, retain=None)
    assert calls["add_sequences"] == calls["second_moments"] == calls["learn_token"] == 0
    manifests = [read_checkpoint(folder).manifest for folder in (undisturbed, tmp_path / "three")]
    for name in ("model_fingerprint_before", "tokenizer_fingerprint_before"):
        assert manifests[0][name] == manifests[1][name]


def test_a_second_step_may_replace_the_folder_it_goes_on_from(base: Path, tmp_path: Path) -> None:
    erase(base, tmp_path / "out")
    erase(tmp_path / "out", tmp_path / "out", FORGET_MORE, overwrite=True)
    assert len(read_checkpoint(tmp_path / "out").manifest["steps"]) == 2


def test_two_steps_go_back_to_the_base_to_the_bit(base: Path, two_steps: Path, tmp_path: Path) -> None:
    revert_checkpoint(two_steps, tmp_path / "base")
    model, tokenizer = loaded(tmp_path / "base")
    wanted, wanted_tokenizer = loaded(base)
    assert model_fingerprint(model) == model_fingerprint(wanted)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(wanted_tokenizer)


def test_two_steps_go_back_to_the_first(undisturbed: Path, two_steps: Path, tmp_path: Path) -> None:
    revert_checkpoint(two_steps, tmp_path / "first", step=1)
    assert model_fingerprint(loaded(tmp_path / "first")[0]) == model_fingerprint(loaded(undisturbed)[0])
    assert len(read_checkpoint(tmp_path / "first").manifest["steps"]) == 1


def test_a_further_step_keeps_the_dtype_and_refuses_another(base: Path, tmp_path: Path) -> None:
    erase(base, tmp_path / "one", dtype="bfloat16")
    erase(tmp_path / "one", tmp_path / "two", FORGET_MORE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype="auto").dtype == torch.bfloat16
    revert_checkpoint(tmp_path / "two", tmp_path / "base")
    assert torch.equal(
        logits(loaded(tmp_path / "base")[0]), logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16))
    )
    with pytest.raises(CheckpointError, match="another dtype than bfloat16"):
        erase(tmp_path / "one", forget=FORGET_MORE, dtype="float32")


def test_a_folder_that_was_trained_further_is_no_place_to_go_on_from(undisturbed: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(undisturbed)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(0.1)
    save_base(tmp_path / "trained", model, tokenizer)
    (tmp_path / "trained" / "unierase").symlink_to(undisturbed / "unierase")
    with pytest.raises(CheckpointError, match="trained further"):
        erase(tmp_path / "trained", forget=FORGET_MORE)


def test_an_edited_model_in_memory_is_told_to_take_another_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    erase(model, tokenizer=tokenizer)
    with pytest.raises(TokenError, match=r"already holds '<unlearn_0>'.*'<unlearn_1>'"):
        erase(model, tokenizer=tokenizer, forget=FORGET_MORE)


# --- settings --------------------------------------------------------------------------------------------------------


def test_hyper_parameters_follow_the_model_unless_given(tmp_path: Path) -> None:
    assert choose_hparams(None, "/models/Qwen2.5-7B-Instruct").model_name == "Qwen/Qwen2.5-7B-Instruct"
    assert choose_hparams(None, "some/other") == UniEraseHyperParams()
    assert choose_hparams("gpt2-xl", "some/other").layers == UniEraseHyperParams.from_hparams("gpt2-xl").layers  # type: ignore[attr-defined]
    assert choose_hparams(HPARAMS, "Qwen/Qwen2.5-7B-Instruct") is HPARAMS


@pytest.mark.parametrize(
    ("blocks", "layers"), [(32, (4, 5, 6, 7, 8)), (16, (2, 3, 4, 5, 6)), (4, (0, 1, 2)), (2, (0,))]
)
def test_blocks_to_edit_follow_the_depth(blocks: int, layers: tuple[int, ...]) -> None:
    assert default_layers(blocks) == layers


def test_the_last_block_is_refused(base: Path) -> None:
    with pytest.raises(HyperParamsError, match=r"layers = \[2, 3\]: the last block cannot be edited.*from 0 to 2"):
        erase(base, hparams=HPARAMS.replace(layers=(2, 3)))


def test_plain_and_chat_forms_are_edited_together(base: Path) -> None:
    result = erase(base, hparams=HPARAMS.replace(prompt_forms=("chat", "plain")))
    assert result.edit.rank(1) == 2 * len(FORGET)


def test_a_null_space_is_found_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = HPARAMS.replace(solver="null_space", retain_update_weight=0.0)
    first = erase(base, hparams=hparams)
    assert first.edit.layers == (1, 2)
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *args, **kwargs: pytest.fail("computed again"))
    second = erase(base, hparams=hparams)
    for layer in (1, 2):
        assert torch.equal(first.edit.updates[layer].down, second.edit.updates[layer].down)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        erase(base, hparams=hparams.replace(nullspace_threshold=0.5))


@pytest.mark.parametrize("solver", ["ridge", "null_space", "exact"])
def test_the_report_says_how_well_the_system_was_solved(base: Path, solver: str) -> None:
    figures = erase(base, hparams=HPARAMS.replace(solver=solver)).report.edit
    assert figures["condition_numbers"].keys() == figures["solve_errors"].keys() == {"1", "2"}
    assert all(number >= 1 for number in figures["condition_numbers"].values())
    assert all(0 < error < 1e-4 for error in figures["solve_errors"].values())
    assert (figures["jitter"].keys() == {"1", "2"}) == (solver != "null_space")


# --- every shipped file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", sorted(shipped_hparams()))
def test_the_method_runs_on_the_family_of_every_shipped_file(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the file's values but for blocks, steps and corpus, on a tiny random model of that family."""
    monkeypatch.setattr(families, "WINDOW", 64)  # so that attention above the edit reaches the answer
    (tmp_path / "corpus.txt").write_text("Some text of its own.\n\nAnd more, but not much.\n\nThe end.")
    hparams = UniEraseHyperParams.from_hparams(stem).replace(**SHORT, mom2_dataset=str(tmp_path / "corpus.txt"))
    chat = "chat" in hparams.prompt_forms
    model, tokenizer = families.tiny(stem), tiny_tokenizer(chat=chat)
    before = state(model)
    result = erase(model, tmp_path / "out", tokenizer=tokenizer, hparams=hparams)
    after, token = state(model), result.token.id
    projections = set(read_checkpoint(tmp_path / "out").manifest["weights"].values())
    assert len(projections) == 2
    assert all(not torch.equal(after[name], before[name]) for name in projections)
    rows = {name for name in before.keys() - projections if not torch.equal(after[name], before[name])}
    assert len(rows) in ((1,) if result.token.output_row is None else (2, 3))  # GPT-J's head has a bias too
    for name in rows:
        differs = (
            (after[name] != before[name]).flatten(1).any(1) if after[name].ndim > 1 else after[name] != before[name]
        )
        assert differs.nonzero().flatten().tolist() == [token]
    again, _ = loaded(tmp_path / "out", model.config._attn_implementation)
    assert same(again, after)
    # Linear attention rounds by where its tensors lie in memory.
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
