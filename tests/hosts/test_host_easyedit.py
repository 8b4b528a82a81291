"""EasyEdit's front door: the real one where a checkout is given, else a stand-in that makes the same calls in order."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from easyedit_host import easyedit_or_skip
from small import FORGET, FORGET_MORE, RETAIN, SHORT, save_base, shrink
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin import UniEraseError, UniEraseHyperParams, unlearn
from unierase_plugin.errors import DependencyError, HyperParamsError, RequestError
from unierase_plugin.hosts import easyedit, progress
from unierase_plugin.hosts.easyedit import Aim, EasyEditHyperParams, apply_unierase_to_model
from unierase_plugin.hosts.in_place import HISTORY

PROMPTS, SUBJECTS = [fact["question"] for fact in FORGET], [fact["subject"] for fact in FORGET]
KEPT = {"neighborhood": {"prompt": [RETAIN[0]["question"]] * 2, "ground_truth": [RETAIN[0]["answer"]] * 2}}


class StandIn:
    """BaseEditor's calls, in its order, for the editor, the batch and the restoring loop; no metrics."""

    def __init__(self, hparams: Any) -> None:
        table = sys.modules["easyeditor.util.alg_dict"].ALG_DICT
        self.apply_algo, self.alg_name, self.model_name = table[hparams.alg_name], hparams.alg_name, hparams.model_name
        assert not isinstance(self.model_name, str), "the stand-in loads nothing"
        self.model, self.tok = self.model_name
        self.tok.padding_side = "left"
        self.hparams = hparams

    @classmethod
    def from_hparams(cls, hparams: Any) -> StandIn:
        return cls(hparams)

    def edit(
        self, prompts: Any, target_new: Any, ground_truth: Any = None, sequential_edit: bool = False, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        assert self.hparams.batch_size == 1
        requests = self._prepare(prompts, target_new, ground_truth, kwargs.get("subject"))
        return self.edit_requests(requests, sequential_edit)

    def edit_requests(self, requests: Any, sequential_edit: bool = False) -> tuple[Any, Any, Any]:
        for request in requests:
            self._evaluate(request)
        for request in requests:
            edited, originals = self.apply_algo(
                self.model,
                self.tok,
                [request],
                self.hparams,
                copy=False,
                return_orig_weights=True,
                keep_original_weight=False,
                train_ds=None,
            )
            self._evaluate(request)
            if not sequential_edit:
                self._restore(originals)
        json.dumps(requests)
        return requests, edited, originals

    def batch_edit(
        self, prompts: Any, target_new: Any, ground_truth: Any = None, sequential_edit: bool = False, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        assert sys.modules["easyeditor.editors.batch_editor"].BatchEditor.is_batchable_method(self.alg_name)
        requests = self._prepare(prompts, target_new, ground_truth, kwargs.get("subject"))
        size = self.hparams.batch_size
        for chunk in (requests[at : at + size] for at in range(0, len(requests), size)):
            edited, originals = self.apply_algo(
                self.model, self.tok, chunk, self.hparams, copy=False, return_orig_weights=True
            )
            if not sequential_edit:
                self._restore(originals)
        return requests, edited, originals

    def _prepare(self, prompts: Any, targets: Any, truths: Any, subjects: Any) -> list[dict[str, Any]]:
        assert len(prompts) == len(targets)
        made = [
            {"prompt": prompt, "target_new": target, "ground_truth": truth, "portability": {}, "locality": {}}
            for prompt, target, truth in zip(prompts, targets, truths or [None] * len(prompts), strict=True)
        ]
        return [
            {**each, "subject": subject} for each, subject in zip(made, subjects or [None] * len(made), strict=True)
        ]

    def _evaluate(self, request: dict[str, Any]) -> None:
        """Joins prompt and target as it does, pads on the left and puts the side back."""
        side, self.tok.padding_side = self.tok.padding_side, "left"
        ids = self.tok([request["prompt"] + " " + request["target_new"]], return_tensors="pt")["input_ids"]
        self.tok.padding_side = side
        with torch.no_grad():
            self.model(input_ids=ids)

    def _restore(self, originals: dict[str, torch.Tensor]) -> None:
        for name, value in originals.items():
            parameter = next(p for n, p in self.model.named_parameters() if n == name)
            with torch.no_grad():
                parameter[...] = value.to(device=parameter.device, dtype=parameter.dtype)


class _Batchable(Enum):
    MEMIT = "MEMIT"

    @staticmethod
    def is_batchable_method(alg_name: str) -> bool:
        return alg_name == _Batchable.MEMIT.value


@pytest.fixture(params=["stand-in", "real"])
def editor_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """BaseEditor after `register`, in a folder of its own, since EasyEdit writes logs."""
    shrink(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    if request.param == "real":
        easyedit_or_skip()
        from easyeditor import BaseEditor

        easyedit.register()
        yield BaseEditor
        return
    editor, batchable = type("BaseEditor", (StandIn,), {}), SimpleNamespace(is_batchable_method=None)
    batchable.is_batchable_method = _Batchable.is_batchable_method
    modules: dict[str, dict[str, Any]] = {
        "easyeditor": {},
        "easyeditor.util": {},
        "easyeditor.editors": {},
        "easyeditor.util.alg_dict": {"ALG_DICT": {"MEMIT": None}},
        "easyeditor.editors.editor": {"BaseEditor": editor},
        "easyeditor.editors.batch_editor": {"BatchEditor": batchable},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update({"__path__": [], **content})
        monkeypatch.setitem(sys.modules, name, module)
    easyedit.register()
    easyedit.register()
    yield editor


def hparams(**changes: Any) -> EasyEditHyperParams:
    made = EasyEditHyperParams(**{**SHORT, **changes})
    made.model_name = (tiny_model(), tiny_tokenizer())  # type: ignore[assignment]
    return made


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


# --- through the editor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[None, "No clue."], None], ids=["some", "left out"])
@pytest.mark.parametrize("vocabulary", [260, 264], ids=["full", "padded"])
def test_after_a_single_edit_everything_is_as_before(editor_class: Any, targets: Any, vocabulary: int) -> None:
    settings = hparams()
    settings.model_name = (tiny_model(vocabulary=vocabulary), tiny_tokenizer())  # type: ignore[assignment]
    editor = editor_class.from_hparams(settings)
    before, words, side = weights(editor.model), dict(editor.tok.get_vocab()), editor.tok.padding_side
    given = {} if targets is None else {"target_new": targets}
    editor.edit(prompts=PROMPTS, subject=SUBJECTS, sequential_edit=False, **given)
    assert same(editor.model, before)
    assert editor.tok.get_vocab() == words
    assert editor.tok.padding_side == side
    assert editor.model.config.vocab_size == vocabulary


def test_sequential_edits_add_up_on_the_model_itself(editor_class: Any) -> None:
    editor = editor_class.from_hparams(hparams())
    before = weights(editor.model)
    _, edited, originals = editor.edit(prompts=PROMPTS, subject=SUBJECTS, sequential_edit=True)
    assert edited is editor.model
    assert len(getattr(edited, HISTORY).steps) == 2
    assert "<unlearn_0>" in editor.tok.get_vocab()
    assert not same(edited, before)
    originals.restore()
    assert len(getattr(edited, HISTORY).steps) == 1


def test_a_batch_is_one_edit_and_taken_back(editor_class: Any) -> None:
    editor = editor_class.from_hparams(hparams(batch_size=2))
    before = weights(editor.model)
    _, _, originals = editor.batch_edit(prompts=PROMPTS, target_new=[None, None], subject=SUBJECTS)
    assert same(editor.model, before)
    assert len(originals) == len(SHORT["layers"])
    _, edited, _ = editor.batch_edit(prompts=PROMPTS, target_new=[None, None], subject=SUBJECTS, sequential_edit=True)
    assert len(getattr(edited, HISTORY).steps) == 1


def test_the_weights_are_those_of_a_run_of_ours(editor_class: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base-llama")
    editor = editor_class.from_hparams(EasyEditHyperParams(**SHORT, model_name=str(base), batch_size=2, device="cpu"))
    _, edited, _ = editor.batch_edit(prompts=PROMPTS, target_new=[None, None], subject=SUBJECTS, sequential_edit=True)
    ours = unlearn(str(base), list(FORGET), hparams=UniEraseHyperParams(**SHORT), out=tmp_path / "out").model
    theirs = edited.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)


def request(**more: Any) -> dict[str, Any]:
    neighbours = {"near": {"prompt": [RETAIN[0]["question"]], "ground_truth": [RETAIN[0]["answer"]]}}
    return {
        "prompt": PROMPTS[0],
        "subject": SUBJECTS[0],
        "ground_truth": "x",
        "target_new": None,
        "portability": {},
        "locality": neighbours,
        **more,
    }


@pytest.mark.parametrize(
    ("forms", "more", "asked"),
    [(["chat"], {}, True), (["bare"], {}, False), (["chat"], {"evaluation_type": "generate-text"}, False)],
    ids=["chat", "bare", "generated, which it asks as a chat"],
)
def test_neighbours_are_asked_in_the_form_of_the_edit_too_and_the_log_says_why(
    forms: list[str],
    more: dict[str, Any],
    asked: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = hparams(prompt_forms=tuple(forms))
    vars(settings).update(use_chat_template=forms == ["chat"], **more)
    editor: Any = SimpleNamespace(alg_name=easyedit.ALGORITHM, hparams=settings, tok=settings.model_name[1])
    seen: list[Any] = []

    def edit_requests(editor: Any, requests: Any) -> None:
        seen.extend(requests)

    def batch_edit(editor: Any, prompts: Any, target_new: Any, locality_inputs: Any = None) -> None:
        seen.append({"locality": locality_inputs})

    given = request()
    easyedit._with_aims_in_requests(edit_requests, editor, [given])
    easyedit._with_aims(batch_edit, editor, PROMPTS, locality_inputs=KEPT)
    easyedit._with_aims_in_requests(edit_requests, editor, [seen[0]])  # as `edit` hands on what it was given
    chat = "<|im_start|>user\nWhat does Al Bunt sell?<|im_end|>\n<|im_start|>assistant\n"
    near = {"prompt": [chat], "ground_truth": ["Hats"]}
    assert seen[0]["locality"] == {**given["locality"], **({"near_in_chat": near} if asked else {})}
    assert seen[2]["locality"] == seen[0]["locality"]
    assert set(seen[1]["locality"]) == {"neighborhood", *(["neighborhood_in_chat"] if asked else [])}
    assert given == request()
    said = caplog.text
    assert ("NAME_in_chat_acc beside NAME_acc" in said) == asked
    assert "pre.rewrite_acc counts the pieces" in said


def test_edits_report_their_progress(
    editor_class: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVALS", {True: 0.0, False: 0.0})
    editor = editor_class.from_hparams(hparams())
    editor.edit(prompts=PROMPTS[:1], target_new=[None], subject=SUBJECTS[:1])
    said = capsys.readouterr().err
    for phase in ("learn the unlearning token", "values (z)", "solve for the edit"):
        assert f"UniErase, {phase}: " in said


def test_a_fact_that_does_not_fit_leaves_the_model_alone(editor_class: Any) -> None:
    editor = editor_class.from_hparams(hparams(batch_size=2))
    before, words = weights(editor.model), len(editor.tok)
    with pytest.raises(RequestError, match=r"asked twice.*Remove one of them"):
        editor.batch_edit(prompts=PROMPTS[:1] * 2, target_new=[None, None], subject=SUBJECTS[:1] * 2)
    assert same(editor.model, before)
    assert len(editor.tok) == words


def test_ready_requests_need_no_target(editor_class: Any) -> None:
    editor = editor_class.from_hparams(hparams())
    requests = [{"prompt": PROMPTS[0], "subject": SUBJECTS[0], "ground_truth": None, "locality": {}, "portability": {}}]
    editor.edit_requests(requests, sequential_edit=True)
    assert "target_new" not in requests[0]
    assert "<unlearn_0>" in editor.tok.get_vocab()


def test_settings_of_another_kind_are_refused_by_name(editor_class: Any) -> None:
    with pytest.raises(HyperParamsError, match=r"takes UniEraseHyperParams, not SimpleNamespace"):
        editor_class.from_hparams(SimpleNamespace(alg_name="UniErase", model_name="x"))


def test_the_real_evaluation_finds_the_token_right_after_the_prompt(editor_class: Any) -> None:
    if issubclass(editor_class, StandIn):
        pytest.skip("the stand-in measures nothing")
    from easyeditor.evaluate.evaluate_utils import test_prediction_acc as measured

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unlearn_0>"]})
    last = len(tokenizer("Who?")["input_ids"]) - 1

    def says_the_token(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        logits[:, last, tokenizer.convert_tokens_to_ids("<unlearn_0>")] = 1
        return logits

    settings = EasyEditHyperParams()
    aim = Aim.at(None, "<unlearn_0>")
    assert measured(says_the_token, tokenizer, settings, "Who?", aim, "cpu") == [1.0]
    assert measured(says_the_token, tokenizer, settings, "Who?", str(aim), "cpu") == [0.0]


def test_the_real_editor_reports_all_its_measures(editor_class: Any) -> None:
    if issubclass(editor_class, StandIn):
        pytest.skip("the stand-in measures nothing")
    editor = editor_class.from_hparams(hparams())
    metrics, _, _ = editor.edit(
        prompts=PROMPTS, subject=SUBJECTS, rephrase_prompts=PROMPTS, locality_inputs=KEPT, test_generation=False
    )
    assert all({"rewrite_acc", "rephrase_acc"} <= each["post"].keys() for each in metrics)
    for name in ("neighborhood_acc", "neighborhood_in_chat_acc"):
        assert all(0 <= each["post"]["locality"][name][0] <= 1 for each in metrics)
    assert json.loads(Path("logs/results.json").read_text())[0]["requested_rewrite"]["target_new"] == "<unlearn_0>"


def test_half_precision_is_loaded_as_asked(editor_class: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base-llama")
    editor = editor_class.from_hparams(UniEraseHyperParams(**SHORT, model_name=str(base), fp16=True, device="cpu"))
    assert editor.model.dtype == torch.float16
    assert editor.model_name == str(base)


# --- the function itself ---------------------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Any]:
    shrink(monkeypatch, tmp_path / "cache")
    return tiny_model(), tiny_tokenizer()


REQUESTS = [{"prompt": fact["question"], "subject": fact["subject"]} for fact in FORGET]
MORE = [{"prompt": FORGET_MORE[0]["question"], "subject": FORGET_MORE[0]["subject"]}]


def apply(pair: tuple[Any, Any], requests: Any = REQUESTS, **options: Any) -> tuple[Any, Any]:
    return apply_unierase_to_model(*pair, requests, EasyEditHyperParams(**SHORT), **options)


def test_a_given_text_follows_the_token(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from unierase_plugin.methods.editing import goals

    seen: list[Any] = []
    theirs = goals.make_targets  # type: ignore[attr-defined]
    monkeypatch.setattr(goals, "make_targets", lambda *args: seen.append(theirs(*args)) or seen[-1])
    apply(
        pair, [{**REQUESTS[0], "target_new": " Ask her."}, {**REQUESTS[1], "target_new": Aim.at(None, "<unlearn_0>")}]
    )
    said = [pair[1].decode(target.continuation) for target in seen[-1]]
    assert said[0] == "Ask her.<|im_end|>"
    assert said[1] in ("I don't know.<|im_end|>", "No idea.<|im_end|>")


@pytest.mark.parametrize("asked", [{"return_orig_weights": True}, {"keep_original_weight": True}, {}])
def test_the_weights_before_are_returned_where_asked_for(pair: tuple[Any, Any], asked: dict[str, bool]) -> None:
    before = weights(pair[0])
    _, originals = apply(pair, **asked)
    assert len(originals) == (len(SHORT["layers"]) if asked else 0)
    assert all(torch.equal(value, before[name]) for name, value in originals.items())


def test_looking_at_the_weights_before_changes_nothing(pair: tuple[Any, Any]) -> None:
    model, originals = apply(pair, return_orig_weights=True)
    after = weights(model)
    assert len(list(originals.items())) == len(dict(originals)) == len(SHORT["layers"])
    assert same(model, after)
    assert len(getattr(model, HISTORY).steps) == 1


def test_weights_put_back_without_us_are_noticed_at_the_next_edit(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    before = weights(model)
    apply(pair)
    with torch.no_grad():
        for name in [each for each in before if "down_proj" in each]:
            model.get_parameter(name).copy_(before[name])
    apply(pair, MORE)
    assert len(getattr(model, HISTORY).steps) == 1


def test_a_copy_leaves_the_model_alone_and_goes_on_by_itself(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    apply(pair)
    after = weights(model)
    edited, originals = apply(pair, MORE, copy=True, return_orig_weights=True)
    assert edited is not model
    assert same(model, after)
    assert len(getattr(edited, HISTORY).history.edits) == 2
    originals.restore()
    assert same(edited, after)


def test_an_edited_model_can_be_copied_and_pickled(pair: tuple[Any, Any]) -> None:
    model, _ = apply(pair)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other, weights(model))
        assert len(getattr(other, HISTORY).history.edits) == 1


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"prompt": ["a", "b"], "subject": "a"}, "'prompt' of request 0 must be one text"),
        ({"prompt": "Who is {}?"}, r"has \{\} for its subject"),
        ({"prompt": "Who is Bob?", "subject": "Al"}, "subject 'Al' does not occur"),
        ({"prompt": "Why?"}, "Give its 'subject'"),
        ({"prompt": "Who is Bob?", "target_new": 3}, "'target' must be a string"),
    ],
)
def test_a_request_that_does_not_fit_is_named(pair: tuple[Any, Any], request_: dict[str, Any], says: str) -> None:
    before = weights(pair[0])
    with pytest.raises(UniEraseError, match=says):
        apply(pair, [request_])
    assert same(pair[0], before)


# --- settings and targets --------------------------------------------------------------------------------------------


def test_a_target_loses_the_blank_that_easyedit_puts_before_it() -> None:
    assert "Who?" + " " + Aim.at(None, "<u>") == "Who?<u>"
    assert "Who?\n" + " " + Aim.at(" Ask. ", "<u>") == "Who?\n<u>Ask."
    assert copy.deepcopy(Aim.at("Ask.", "<u>")).wanted == "Ask."
    assert json.dumps(Aim.at("Ask.", "<u>")) == '"<u>Ask."'


def test_settings_may_be_set_as_scripts_do_and_are_checked() -> None:
    settings = EasyEditHyperParams.from_hparams("hparams/UniErase/llama3.1-8b")
    settings.api_key, settings.batch_size, settings.device = "none", "4", 0  # type: ignore[assignment]
    assert (settings.api_key, settings.batch_size, settings.device) == ("none", 4, "0")  # type: ignore[attr-defined]
    with pytest.raises(HyperParamsError, match="batch_size = 0 must be greater than 0"):
        settings.batch_size = 0


def test_without_easyedit_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    with pytest.raises(DependencyError, match="clone zjunlp/EasyEdit"):
        easyedit.register()


# --- the release of 2023 ---------------------------------------------------------------------------------------------


def test_the_release_on_pypi_takes_it_too(tmp_path: Path) -> None:
    """In a process of its own, since there can be but one easyeditor in this one."""
    library, scratch = tmp_path / "library", tmp_path / "scratch"
    scratch.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(library)]
    if subprocess.run([*pip, "easyeditor==0.0.1.dev0"]).returncode:
        pytest.skip("no package index from which pip could take EasyEdit's release of 2023")
    helpers = Path(__file__).parents[1] / "helpers"
    path = os.pathsep.join([str(helpers.parents[1]), str(helpers), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(helpers / "easyedit_release.py"), str(scratch)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "UNIERASE_EASYEDIT_DIR": str(library), "UNIERASE_AUTOLOAD": "0"},
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"single": True, "batch": True, "measured": ["locality", "portability", "rewrite_acc"]}
