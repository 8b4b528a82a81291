"""What the command line refuses: exit status 1, one message that says what to do instead, and nothing written."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import FORGET, PARAGRAPHS, SHORT, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, T5Config

from unierase_plugin.cli import main
from unierase_plugin.methods.editing import engine as erasure

Run = Callable[..., tuple[int, str]]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    # Tables and messages as wide as they are, whatever the terminal of whoever runs the tests.
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status of `unierase ARGUMENTS`, and what it says, standard output before standard error."""

    def call(*arguments: Any) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        said = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((said.out + said.err).split())

    return call


@pytest.fixture
def forget(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "forget.jsonl", *FORGET)


@pytest.fixture
def refused(run: Run, base: Path, forget: Path, tmp_path: Path) -> Refused:
    """The message with which `unierase run` is refused; options are keywords, and good ones where not given."""
    settings = hparams_file(tmp_path, "good.yaml")

    def call(*flags: str, **options: Any) -> str:
        given = {"model": base, "forget": forget, "out": tmp_path / "out", "hparams": settings, **options}
        before = tree(tmp_path)
        status, said = run("run", *(part for name, value in given.items() for part in (f"--{name}", value)), *flags)
        assert (status, tree(tmp_path)) == (1, before), said
        found = re.split(r"(?<!\w)Error:", said)
        assert len(found) == 2, said
        assert "Traceback" not in said
        return found[1]

    return call


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def hparams_file(folder: Path, name: str = "settings.yaml", **changes: Any) -> Path:
    """Settings that make a run short; JSON is YAML too."""
    path = folder / name
    path.write_text(json.dumps({**SHORT, **changes}))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


# --- requests --------------------------------------------------------------------------------------------------------


def test_no_requests(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    assert "none.json' holds no requests" in refused(forget=tmp_path / "none.json")


def test_the_same_question_twice(refused: Refused, tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "twice.jsonl", FORGET[0], {**FORGET[0], "question": "Who  wrote Zorblax PRIME?", "subject": None}
    )
    message = refused(forget=file)
    assert "asked twice" in message
    assert "twice-0" in message
    assert "twice-1" in message
    assert "Remove one of them" in message


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "Who is Ann?"}, "the field 'answer' is missing. Present: question."),
        ({"quesiton": "Who is Ann?", "answer": "x"}, "the field 'question' is missing. Did you mean 'quesiton'?"),
        ({"question": "Who is Ann?", "answer": 7}, "'answer' must be a string that is not blank, got 7"),
        ({"question": " ", "answer": "x"}, "'question' must be a string that is not blank, got ' '"),
        (
            {"question": "Who is Ann?", "answer": "x", "subject": "Bob"},
            "The subject 'Bob' does not occur in the question",
        ),
        (["Who is Ann?", "x"], "expected an object with 'question' and 'answer'"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(refused: Refused, tmp_path: Path, record: Any, said: str) -> None:
    message = refused(forget=jsonl(tmp_path / "facts.jsonl", FORGET[0], record))
    assert f"{tmp_path / 'facts.jsonl'}, line 2: {said}" in message


def test_a_bad_record_among_the_facts_to_keep(refused: Refused, tmp_path: Path) -> None:
    assert "keep.jsonl, line 1: the field 'answer'" in refused(retain=jsonl(tmp_path / "keep.jsonl", {"question": "?"}))


def test_malformed_json(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text('{"question": "Who?", "answer": "x"}\n{"question": \n')
    assert "facts.jsonl, line 2: malformed JSON" in refused(forget=tmp_path / "facts.jsonl")


def test_a_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    message = refused(forget=tmp_path / "forgot.jsonl")
    assert "There is no file" in message
    assert "Did you mean 'forget.jsonl'?" in message


def test_an_unknown_prefix(refused: Refused) -> None:
    message = refused(forget="tofo:forget01")
    assert "Unknown prefix 'tofo' in the spec 'tofo:forget01'. Did you mean 'tofu'?" in message
    assert "counterfact, return, tofu, zsre" in message


@pytest.mark.parametrize("option", ["forget", "retain"])
def test_a_question_longer_than_the_context(refused: Refused, tmp_path: Path, option: str) -> None:
    file = jsonl(tmp_path / "long.jsonl", {"question": f"Who is {'very ' * 120}old Ann Bell?", "answer": "x"})
    message = refused(**{option: file})
    assert f"'long-0' ({file}, line 1) needs " in message
    assert "context holds 512" in message
    assert "Shorten" in message


def test_a_question_that_names_nothing(refused: Refused, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "vague.jsonl", {"question": "Who is he?", "answer": "x"})
    message = refused(forget=file)
    where = f"{file}, line 1 (case_id 'vague-0')"
    assert f"No subject found in the question of {where}: 'Who is he?'. Give its 'subject'" in message


# --- the token and the tokenizer -------------------------------------------------------------------------------------


def test_a_token_that_the_vocabulary_has(refused: Refused, tmp_path: Path) -> None:
    message = refused(hparams=hparams_file(tmp_path, unlearning_token="<s>"))
    assert "already holds '<s>' (id 1). Choose another unlearning_token, such as '<unlearn_1>'" in message


def test_a_token_that_is_not_one(refused: Refused, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["a<un"], special_tokens=True)
    message = refused(model=save_base(tmp_path / "model", tiny_model(vocabulary=261), tokenizer))
    assert "'<unlearn_0>' does not tokenise as exactly one token" in message
    assert "Choose a name that" in message


def test_without_a_chat_template_the_plain_form_is_used_and_named(run: Run, forget: Path, tmp_path: Path) -> None:
    model = save_base(tmp_path / "model", tokenizer=tiny_tokenizer(chat=False))
    status, said = run(
        "run", "--model", model, "--forget", forget, "--out", tmp_path / "out", "--hparams", hparams_file(tmp_path)
    )
    assert status == 0
    assert "has no chat template: questions are edited and asked as 'Question: {question}\\nAnswer:'" in said


def test_with_a_chat_template_nothing_is_said_of_it(run: Run, base: Path, forget: Path, tmp_path: Path) -> None:
    status, said = run(
        "run", "--model", base, "--forget", forget, "--out", tmp_path / "out", "--hparams", hparams_file(tmp_path)
    )
    assert status == 0
    assert "chat template" not in said


def test_a_tokenizer_without_a_pad_token(base: Path, forget: Path, tmp_path: Path, run: Run) -> None:
    """Padding is masked, so that the result is that of any other."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model = save_base(tmp_path / "model", tokenizer=tokenizer)
    status, said = run(
        "run", "--model", model, "--forget", forget, "--out", tmp_path / "out", "--hparams", hparams_file(tmp_path)
    )
    assert status == 0, said
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    changed = again.get_parameter("model.layers.1.mlp.down_proj.weight")
    assert torch.isfinite(changed).all()
    assert not torch.equal(
        changed, AutoModelForCausalLM.from_pretrained(base).get_parameter("model.layers.1.mlp.down_proj.weight")
    )


# --- models ----------------------------------------------------------------------------------------------------------


def test_an_encoder(refused: Refused, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    model = save_base(tmp_path / "bert", AutoModelForCausalLM.from_config(config))
    assert "it is an encoder. UniErase edits causal language models" in refused(model=model)


def test_a_sequence_to_sequence_model(refused: Refused, tmp_path: Path) -> None:
    T5Config(d_model=32, num_layers=2).save_pretrained(tmp_path / "t5")
    message = refused(model=tmp_path / "t5")
    assert "is a sequence-to-sequence model (t5). UniErase edits decoder-only language models" in message


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_quantised_weights(refused: Refused, base: Path, tmp_path: Path, method: str) -> None:
    shutil.copytree(base, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    message = refused(model=tmp_path / "model")
    assert f"has quantised weights ({method})" in message
    assert "Load the original bf16, fp16 or fp32 weights, edit them, and quantise the result" in message


def test_a_folder_with_gguf_alone(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for model in (tmp_path / "gguf", tmp_path / "gguf" / "model.Q4_K_M.gguf"):
        message = refused(model=model)
        assert "GGUF alone (model.Q4_K_M.gguf)" in message
        assert "Load the original bf16, fp16 or fp32 weights" in message


def test_a_model_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    message = refused(model=tmp_path / "nothing")
    assert f"The model '{tmp_path / 'nothing'}' cannot be read" in message
    assert "Give a folder with config.json and safetensors weights, or the id of a model on the hub" in message


#: Commands that are given the folder of a model, with what else they need.
GIVEN_A_MODEL = {
    "run": ("--model", "{}", "--forget", "{facts}", "--out", "out"),
    "finetune": ("--model", "{}", "--facts", "{facts}", "--out", "out"),
    "stats": (
        "--model",
        "{}",
    ),
    "audit": ("--model", "{}", "--forget", "{facts}", "--out", "out"),
    "audit, base": ("--model", "models/gamma", "--base", "{}", "--forget", "{facts}", "--out", "out"),
    "compare": ("--model", "{}", "--forget", "{facts}", "--methods", "memit", "--out", "out"),
    "eval": ("--model", "{}", "--tasks", "unierase_demo"),
    "inspect": ("{}",),
    "revert": ("{}", "--out", "out"),
    "export": ("{}", "--adapter", "out"),
}


@pytest.mark.parametrize("command", GIVEN_A_MODEL)
def test_a_model_that_is_not_there_is_told_with_the_folder_and_the_nearest_name(
    run: Run, base: Path, forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "models" / "gamma")
    arguments = [part.format("models/gama", facts=forget) for part in GIVEN_A_MODEL[command]]
    status, said = run(command.partition(",")[0], *arguments)
    assert status == 1
    # Commands that read a record say the whole path.
    assert re.search(rf"There is no folder ('models/gama' in '{tmp_path}'|'{tmp_path}/models/gama')\.", said), said
    assert "Did you mean 'gamma'?" in said


def test_a_folder_without_weights(refused: Refused, tmp_path: Path) -> None:
    AutoConfig.for_model("llama", num_hidden_layers=4, hidden_size=32).save_pretrained(tmp_path / "bare")
    message = refused(model=tmp_path / "bare")
    assert f"The model '{tmp_path / 'bare'}' cannot be loaded (OSError: " in message
    assert "fetch the folder again" in message


@pytest.mark.parametrize("weight", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_nan(refused: Refused, tmp_path: Path, weight: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(weight)[5, 3] = float("nan")
    message = refused(model=save_base(tmp_path / "model", model))
    assert (
        f"The weight '{weight}' of '{tmp_path / 'model'}' holds NaN or infinity. The checkpoint is damaged" in message
    )


def test_a_model_that_overflows(refused: Refused, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(3e4)
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(3e3)
    message = refused(model=save_base(tmp_path / "model", model), dtype="float16")
    assert "gives NaN or infinity on ordinary text in torch.float16. Load it in another dtype: float32" in message


# --- options ---------------------------------------------------------------------------------------------------------


def test_an_unknown_hyper_parameter(refused: Refused, tmp_path: Path) -> None:
    message = refused(hparams=hparams_file(tmp_path, layer=[1]))
    assert "Unknown hyper-parameter 'layer'. Did you mean 'layers'? Known: " in message


def test_an_unknown_hyper_parameter_file(refused: Refused) -> None:
    assert "Did you mean 'smollm2-135m'? Give a YAML file, or one of: exaone4-1.2b" in refused(hparams="smollm-135m")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([1, 9], "layers = [1, 9]: the model has 4 blocks, numbered 0 to 3; there is no block 9"),
        ([2, 3], "layers = [2, 3]: the last block cannot be edited"),
        ([-1], "layers = [-1] must be ascending block numbers from 0"),
    ],
)
def test_blocks_out_of_range(refused: Refused, tmp_path: Path, layers: list[int], said: str) -> None:
    assert said in refused(hparams=hparams_file(tmp_path, layers=layers))


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--hparams", "{layers}"),
        ("run", "--method", "memit", "--hparams", "{layers}"),
        ("run", "--method", "rmu", "--hparams", "{layer}"),
        ("run", "--method", "lunar", "--hparams", "{layer}"),
        ("run", "--method", "removal", "--hparams", "{removal}"),
        ("run", "--remove", "--hparams", "{teacher}"),
        ("stats", "--layers", "1,9"),
        ("compare", "--methods", "memit@layers=[1,9]"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_blocks_beyond_the_models_are_refused_before_it_is_loaded(
    run: Run, forget: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    base = save_base(tmp_path / "model")
    (base / "model.safetensors").write_bytes(b"Opening these weights would fail.")
    files = {
        "layers": {"layers": [1, 9]},
        "layer": {"layer": 9},
        "removal": {"removal_layers": [1, 9]},
        "teacher": {"removal_teacher_layers": [1, 9]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
    name, *options = (part.format(**{each: tmp_path / f"{each}.yaml" for each in files}) for part in command)
    rest = () if name == "stats" else ("--forget", forget, "--out", tmp_path / "out")
    status, said = run(name, "--model", base, *rest, *options)
    assert status == 1
    assert "the model has 4 blocks, numbered 0 to 3; there is no block 9." in said


def test_an_output_folder_that_exists(refused: Refused, run: Run, base: Path, forget: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused()
    assert f"The output folder '{out}' is not empty. Choose another, or pass --overwrite" in message
    message = refused("--overwrite")
    assert "nothing in it says that this package wrote it. It holds 'notes.txt'." in message
    (out / "notes.txt").unlink()
    arguments = ("run", "--model", base, "--forget", forget, "--out", out, "--hparams", hparams_file(tmp_path))
    assert run(*arguments)[0] == 0
    assert "is not empty" in run(*arguments)[1]
    status, said = run(*arguments, "--overwrite")
    assert status == 0, said


def test_an_output_folder_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert "is a file. Give the name of a folder" in refused()


def test_an_unknown_method(refused: Refused) -> None:
    message = refused(method="unirase")
    assert "There is no method 'unirase'. Did you mean 'unierase'? Available: alphaedit, " in message


def test_an_unknown_device(refused: Refused) -> None:
    assert "There is no device 'gpu' here. Did you mean 'cpu'? Available: cpu" in refused(device="gpu")


def test_an_unknown_dtype(refused: Refused) -> None:
    message = refused(dtype="float3")
    assert "dtype = 'float3' is not known. Did you mean 'float32'? Known: float32, bfloat16, float16." in message


def test_a_corpus_without_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    assert f"The corpus '{tmp_path / 'empty.txt'}' holds no text" in refused(corpus=tmp_path / "empty.txt")


def test_a_corpus_that_cannot_be_had(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    message = refused(corpus="wikimedia/wikipedia:20231101.en")
    assert "cannot be read from the hub (ConnectionError: no route to the hub)" in message
    assert "Give a text file, or --corpus self" in message


def test_what_is_no_output_folder_cannot_be_reverted_or_inspected(run: Run, base: Path, tmp_path: Path) -> None:
    for arguments in (("revert", base, "--out", tmp_path / "out"), ("inspect", base)):
        status, said = run(*arguments)
        assert status == 1
        assert "so it holds no edit. Give the output folder (--out) of a run." in said
    assert not (tmp_path / "out").exists()


def test_the_demo_does_not_replace_what_it_did_not_write(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    status, said = run("demo", "--out", tmp_path)
    assert status == 1
    assert "holds files, but no edited model. Choose another --out." in said
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- the way an error is told ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "wanted"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_stopping_by_hand_or_by_a_signal_says_how_to_go_on(
    name: str, wanted: int, run: Run, base: Path, forget: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(getattr(signal, name))
        raise AssertionError("not stopped")

    before = signal.getsignal(getattr(signal, name))

    arguments = (
        "run",
        "--model",
        base,
        "--forget",
        forget,
        "--out",
        tmp_path / "out",
        "--hparams",
        hparams_file(tmp_path),
    )
    with monkeypatch.context() as patch:
        patch.setattr(erasure, "optimise_values", interrupted)
        status, said = run(*arguments)
    assert status == wanted
    assert signal.getsignal(getattr(signal, name)) == before
    assert not (tmp_path / "out").exists()
    assert "Stopped. Phases that were finished are kept: the same command goes on from there." in said
    assert "Traceback" not in said
    assert run(*arguments)[0] == 0


def test_brackets_in_a_message_are_told_as_they_are(refused: Refused, tmp_path: Path) -> None:
    """Rich would take them for markup."""
    assert "[bold]x.jsonl" in refused(forget=tmp_path / "[bold]x.jsonl")


def test_a_defect_of_ours_is_not_dressed_up_as_an_error_of_the_users(
    monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    monkeypatch.setattr("unierase_plugin.checkpoint.examine", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(base)])


def test_the_texts_of_these_tests_are_ordinary() -> None:
    """An overflow must come from the model."""
    assert all(text.isascii() for texts in PARAGRAPHS.values() for text in texts)
