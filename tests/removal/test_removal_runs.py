"""Runs with a removal: alone and with a token, written, taken back, gone on from, exported, and in a harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FORGET, FORGET_MORE, HPARAMS, LINES, PARAGRAPHS, RETAIN, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from unierase_plugin import UnlearnResult, unlearn
from unierase_plugin.checkpoint import export_adapter, read_checkpoint, revert_checkpoint, take_back_requests
from unierase_plugin.cli import app
from unierase_plugin.errors import ArchitectureError, CheckpointError, HyperParamsError, RequestError
from unierase_plugin.facts.request import NO_ANSWER, ForgetRequest
from unierase_plugin.hosts.in_place import edit_in_place
from unierase_plugin.hparams import REMOVED
from unierase_plugin.methods.editing import engine as erasure
from unierase_plugin.methods.editing import goals
from unierase_plugin.methods.editing.rome_memit_alphaedit import MEMITHyperParams
from unierase_plugin.methods.removal import job as removal_job
from unierase_plugin.methods.removal.method import RemovalHyperParams
from unierase_plugin.models.prompts import encode, render
from unierase_plugin.storage.cache import Store
from unierase_plugin.storage.fingerprints import model_fingerprint
from unierase_plugin.storage.tensor_files import read_tensors

IDS = torch.tensor([[5, 60, 70, 8, 9, 100]])
#: A random model knows nothing; what is kept is not to hold it where it is.
FEW: dict[str, Any] = {"removal_passes": 2, "removal_rank": 8, "removal_keep_weight": 1.0, "retain_neighbours": 0}
ALONE = RemovalHyperParams(**FEW)
BOTH = HPARAMS.replace(remove=True, removal_decline_passes=2, **FEW)
#: The method's name and settings: removal by itself, and with a token that is said instead.
KINDS: dict[str, dict[str, Any]] = {
    "alone": {"method": "removal", "hparams": ALONE},
    "token": {"method": "unierase", "hparams": BOTH},
}


class KilledError(Exception):
    """Stands for whatever ends a run."""


def small(patch: pytest.MonkeyPatch, cache: Path) -> None:
    shrink(patch, cache)
    patch.setattr(removal_job, "lines", LINES.__getitem__)
    patch.setattr(removal_job, "paragraphs", PARAGRAPHS.__getitem__)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, tmp_path / "cache")


@pytest.fixture(scope="module", params=KINDS)
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """base, and two steps after it."""
    root = tmp_path_factory.mktemp("steps")
    with pytest.MonkeyPatch.context() as patch:
        small(patch, root / "cache")
        source = save_base(root / "base")
        for step, facts in enumerate((FORGET, FORGET_MORE), start=1):
            unlearn(source, facts, retain=RETAIN, out=root / str(step), **KINDS[request.param])
            source = root / str(step)
    return root, request.param


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def fingerprint(folder: Path) -> str:
    return model_fingerprint(load(folder))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_folders_are_taken_back_to_the_bit(steps: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = steps
    revert_checkpoint(root / "2", tmp_path / "0")
    assert fingerprint(tmp_path / "0") == fingerprint(root / "base")
    revert_checkpoint(root / "2", tmp_path / "1", step=1)
    assert fingerprint(tmp_path / "1") == fingerprint(root / "1")
    # What is left can be gone back from as well.
    revert_checkpoint(tmp_path / "1", tmp_path / "base")
    assert fingerprint(tmp_path / "base") == fingerprint(root / "base")


def test_the_record_says_which_columns_are_the_removals(steps: tuple[Path, str]) -> None:
    root, kind = steps
    found = read_checkpoint(root / "2")
    for edit in found.edits:
        assert edit.removed == {1: 8, 2: 8, 3: 8} == {layer: edit.rank(layer) for layer in edit.layers}
        assert not edit.keys
        assert set(edit.norm_ratios) == {1, 2, 3}
        # The tiny model's weights say nothing, and much has to be added for a token that it never says.
        assert all(0 < ratio < (10 if kind == "token" else 2) for ratio in edit.norm_ratios.values())
    figures = found.report["edit"]["removal"]
    assert len(figures["losses"]) == len(figures["steps"]) == (2 if kind == "alone" else 4)
    assert figures["kept_facts"] == 1
    assert sum(figures["taught"].values()) == len(FORGET_MORE)
    assert (figures["nll_of_what_is_said_instead"] is None) is (kind == "alone")
    assert all(0.5 < share <= 1 for share in figures["energy_kept"].values())
    assert {"moments", "teacher", "passes"} <= set(found.report["seconds"])
    sizes = sum(weight.numel() for weight in read_checkpoint(root / "2").originals.projections.values())  # type: ignore[union-attr]
    total = sum(weight.numel() for weight in load(root / "2").parameters())
    assert found.report["parameters_changed"] == pytest.approx(sizes / total, rel=0.02)


def test_single_requests_are_refused_and_the_remedy_named(steps: tuple[Path, str], tmp_path: Path) -> None:
    root, _ = steps
    with pytest.raises(CheckpointError, match=r"Step 1 removed .* of all its requests together.*Revert the whole step"):
        take_back_requests(root / "1", tmp_path / "out", [FORGET[0]["question"]])
    assert not (tmp_path / "out").exists()
    # Where none of a step's requests stays, all of the step goes.
    take_back_requests(root / "2", tmp_path / "out", [FORGET_MORE[0]["question"]])
    assert fingerprint(tmp_path / "out") == fingerprint(root / "1")


@pytest.mark.parametrize("step", [1, 2])
def test_the_adapter_gives_the_folders_logits(steps: tuple[Path, str], tmp_path: Path, step: int) -> None:
    peft = pytest.importorskip("peft")
    root, kind = steps
    adapter = export_adapter(root / "2", tmp_path / "adapter", step=step)
    base, wanted = load(root / "base"), load(root / str(step))
    if kind == "token":
        base.resize_token_embeddings(wanted.get_input_embeddings().weight.shape[0], mean_resizing=False)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-4, rtol=0)
    assert ("trainable_token_indices" in (adapter / "README.md").read_text()) is (kind == "token")
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(wanted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_in_memory_steps_are_taken_back_one_after_another(kind: str, family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    start = model_fingerprint(model)
    first = unlearn(model, FORGET, tokenizer=tokenizer, retain=RETAIN, **KINDS[kind])
    between = model_fingerprint(model)
    second = unlearn(first, FORGET_MORE, retain=RETAIN, method=KINDS[kind]["method"])
    assert len({start, between, model_fingerprint(model)}) == 3
    second.revert()
    assert model_fingerprint(model) == between
    first.revert()
    assert model_fingerprint(model) == start
    assert len(tokenizer) == len(tiny_tokenizer())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", ["removal-course", "removal-pass", "removal", "after"])
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    kind: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")

    def run(out: Path) -> UnlearnResult:
        return unlearn(base, FORGET, retain=RETAIN, out=out, **KINDS[kind])

    with monkeypatch.context() as patch:
        patch.setenv("UNIERASE_CACHE", str(tmp_path / "other"))
        whole = run(tmp_path / "whole")
    original = Store.put

    def stopping(store: Store, found: str, *rest: Any) -> None:
        original(store, found, *rest)
        if found == last:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", stopping)
        with pytest.raises(KilledError):
            run(tmp_path / "out")
    again = run(tmp_path / "out")
    one, other = (tmp_path / name for name in ("out", "whole"))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    # Metadata are in any order.
    (found, described), (wanted, told) = (read_tensors(each / "unierase/edits.safetensors") for each in (one, other))
    assert described == told
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert again.report.edit["removal"] == whole.report.edit["removal"]


def test_the_token_is_that_of_a_run_without_a_removal(tmp_path: Path) -> None:
    """It is learned on the model as it came, and so shared."""
    base = save_base(tmp_path / "base")
    plain = unlearn(base, FORGET, retain=RETAIN, hparams=HPARAMS, out=tmp_path / "plain")
    removed = unlearn(base, FORGET, retain=RETAIN, hparams=BOTH, out=tmp_path / "removed")
    assert plain.token is not None
    assert removed.token is not None
    assert torch.equal(plain.token.input_row, removed.token.input_row)
    assert fingerprint(tmp_path / "plain") != fingerprint(tmp_path / "removed")


def test_the_passes_raise_the_token_where_it_weighs_something() -> None:
    """More than where the removal stands alone; without weight there is nothing to be told of it."""

    def probability(weight: float) -> tuple[float, Any]:
        model, tokenizer = tiny_model(), tiny_tokenizer()
        settings = BOTH.replace(removal_decline_weight=weight, removal_passes=4, removal_rank=0)
        result = unlearn(model, FORGET, tokenizer=tokenizer, retain=RETAIN, hparams=settings)
        assert result.token is not None
        found = []
        for fact in FORGET:
            ids = encode(tokenizer, render(tokenizer, fact["question"], "chat"), "chat")
            with torch.no_grad():
                found.append(float(model(torch.tensor([ids])).logits[0, -1].softmax(-1)[result.token.id]))
        return min(found), result.report.edit["removal"]["nll_of_what_is_said_instead"]

    (most, said), (least, nothing) = probability(10.0), probability(0.0)
    assert most > 10 * least
    # A model that holds every token as likely as any other has 2 log 260 = 11.
    assert said < 10
    assert nothing is None


def test_a_failing_removal_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    start = model_fingerprint(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KilledError

    for name in ("learn_token", "removal_of", "add_updates"):
        with monkeypatch.context() as patch:
            patch.setattr(goals if name == "learn_token" else erasure, name, fail)
            with pytest.raises(KilledError):
                unlearn(model, FORGET, tokenizer=tokenizer, retain=RETAIN, hparams=BOTH)
        assert model_fingerprint(model) == start
        assert len(tokenizer) == len(tiny_tokenizer())


@pytest.mark.parametrize("target", ["idk", "random_token"])
def test_other_edits_go_on_from_a_removal_too(target: str) -> None:
    model = tiny_model()
    start = model_fingerprint(model)
    settings = {name: getattr(HPARAMS, name) for name in ("layers", "v_num_grad_steps", "mom2_n_samples")}
    hparams = MEMITHyperParams(**settings, target=target, mom2_max_length=24, context_template_length_params=())
    result = unlearn(model, FORGET, tokenizer=tiny_tokenizer(), hparams=hparams, method="memit", remove=True)
    assert result.edit is not None
    assert set(result.edit.removed) == {1, 2, 3}
    result.revert()
    assert model_fingerprint(model) == start


def test_what_cannot_be_removed_is_refused_before_anything_is_done() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(
        HyperParamsError, match=r"'npo_gd' cannot be combined with a removal.*removal is a removal alone"
    ):
        unlearn(model, FORGET, tokenizer=tokenizer, method="npo_gd", remove=True)
    with pytest.raises(HyperParamsError, match="'removal' cannot be hardened"):
        unlearn(model, FORGET, tokenizer=tokenizer, method="removal", harden=True)
    for kind in KINDS.values():
        with pytest.raises(ArchitectureError, match="no block 9"):
            unlearn(
                model,
                FORGET,
                tokenizer=tokenizer,
                method=kind["method"],
                hparams=kind["hparams"].replace(removal_layers=(9,)),
            )


def test_a_harness_gets_it_by_its_settings_and_takes_it_back() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    start = model_fingerprint(model)
    requests = [ForgetRequest(**fact) for fact in FORGET]
    edited, originals = edit_in_place(model, tokenizer, requests, BOTH)
    assert {name.split(".")[2] for name in originals} == {"1", "2", "3"}
    assert model_fingerprint(edited) != start
    originals.restore()
    assert model_fingerprint(model) == start


def test_a_harness_that_hides_answers_is_told() -> None:
    with pytest.raises(RequestError, match="Removal needs the true answer"):
        edit_in_place(
            tiny_model(), tiny_tokenizer(), [ForgetRequest("Who is Bo Strickle?", NO_ANSWER, "Bo Strickle")], BOTH
        )


def test_the_command_line_has_both_ways(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(FORGET))
    settings = tmp_path / "some.yaml"
    lines = [f"{name}: {json.dumps(value)}" for name, value in HPARAMS.as_dict().items()]
    settings.write_text("\n".join(lines))
    common = ["run", "--model", str(base), "--forget", str(facts)]
    found = CliRunner().invoke(app, [*common, "--remove", "--hparams", str(settings), "--out", str(tmp_path / "a")])
    assert found.exit_code == 0, found.output
    found = CliRunner().invoke(app, [*common, "--method", "removal", "--out", str(tmp_path / "b")])
    assert found.exit_code == 0, found.output
    for folder, method in (("a", "unierase"), ("b", "removal")):
        record = read_checkpoint(tmp_path / folder)
        assert record.manifest["method"] == method
        assert record.edits[0].removed
        assert record.manifest["hparams"]["retain_neighbours"] == REMOVED["retain_neighbours"] > 0
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path / folder)])
        assert shown.exit_code == 0, shown.output
