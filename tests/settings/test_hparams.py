"""Hyper-parameters: every shipped file, and what is read, coerced or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, FURTHER

from unierase_plugin.errors import HyperParamsError
from unierase_plugin.hparams import HyperParams, UniEraseHyperParams, find_hparams, read_yaml, shipped_hparams

KEYS = [spec.name for spec in dataclasses.fields(UniEraseHyperParams)]
SHIPPED = shipped_hparams()
#: Decoder blocks of the released models, from their published configs.
DEPTHS = {
    "smollm2-135m": 30,
    "llama2-7b": 32,
    "llama3-8b": 32,
    "llama3.1-8b": 32,
    "llama3.2-1b": 16,
    "llama3.2-3b": 28,
    "qwen2.5-7b": 28,
    "qwen2.5-1.5b": 28,
    "qwen3-8b": 36,
    "mistral-7b": 32,
    "gemma2-9b": 42,
    "gemma3-1b": 26,
    "phi3-mini": 32,
    "olmo2-7b": 32,
    "gpt2-xl": 48,
    "gpt-j-6b": 28,
    "pythia-6.9b": 32,
    "granite3.3-8b": 40,
    "olmo3-7b": 32,
    "exaone4-1.2b": 30,
    "glm4-9b": 40,
    "smollm3-3b": 36,
    "mistral-small3.2-24b": 40,
    "gemma3-4b": 34,
    "gemma3-12b": 48,
    "qwen3-4b": 36,
    "qwen3-30b-a3b": 48,
    "gpt-oss-20b": 24,
    "mixtral-8x7b": 32,
    "olmoe-7b": 16,
    "qwen3-next-80b": 48,
    "falcon-h1-1.5b": 24,
    "lfm2-1.2b": 16,
}
#: What may differ from the defaults in a shipped file: the rest was measured once and holds for all.
MODEL_SPECIFIC = {
    "model_name",
    "layers",
    "prompt_forms",
    "chat_template_kwargs",
    "mom2_dataset",
    "mom2_n_samples",
}
WITHOUT_CHAT_TEMPLATE = {"gpt2-xl", "gpt-j-6b", "pythia-6.9b"}


@pytest.fixture(params=sorted(SHIPPED))
def stem(request: pytest.FixtureRequest) -> str:
    return request.param


def written(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- the shipped files -----------------------------------------------------------------------------------------------


def test_every_family_has_its_file() -> None:
    assert set(SHIPPED) == {*FAMILIES, *FURTHER} == set(DEPTHS)


def test_a_shipped_file_loads_by_name_and_by_path(stem: str) -> None:
    hparams = UniEraseHyperParams.from_hparams(stem)
    assert hparams == UniEraseHyperParams.from_hparams(str(SHIPPED[stem]))
    assert hparams.alg_name == "UniErase"
    assert "/" in hparams.model_name


def test_a_shipped_file_holds_only_what_differs_from_the_defaults_in_one_order(stem: str) -> None:
    hparams, defaults = UniEraseHyperParams.from_hparams(stem).as_dict(), UniEraseHyperParams().as_dict()
    named = ("alg_name", "model_name")
    shared = {spec.name for spec in dataclasses.fields(HyperParams)}
    differs = [key for key in KEYS if key not in named and hparams[key] != defaults[key]]
    given = list(read_yaml(SHIPPED[stem]))
    assert sorted(given) == sorted([*named, *differs])
    assert given[:2] == list(named)
    assert [key for key in given[2:] if key not in shared] == [key for key in differs if key not in shared]


def test_every_key_of_a_shipped_file_has_its_own_comment(stem: str) -> None:
    """On the line above it, where a section's heading does not count."""
    lines = SHIPPED[stem].read_text(encoding="utf-8").splitlines()
    keyed = [at for at, line in enumerate(lines) if line and not line.startswith("#")]
    bare = [lines[at] for at in keyed if not lines[at - 1].startswith("# ") or lines[at - 1].startswith("# ---")]
    assert len(keyed) == len(read_yaml(SHIPPED[stem]))
    assert not bare


def test_a_shipped_file_says_what_was_measured(stem: str) -> None:
    header = SHIPPED[stem].read_text(encoding="utf-8").split("\n\n")[0]
    assert UniEraseHyperParams.from_hparams(stem).model_name in header
    assert ("Measured:" in header) is (stem == "smollm2-135m")
    assert ("Not tested at this size." in header) is (stem != "smollm2-135m")


def test_a_shipped_file_keeps_the_defaults_but_for_what_the_model_decides(stem: str) -> None:
    hparams, defaults = UniEraseHyperParams.from_hparams(stem).as_dict(), UniEraseHyperParams().as_dict()
    assert {key for key in KEYS if hparams[key] != defaults[key]} <= MODEL_SPECIFIC


def test_shipped_blocks_are_neighbours_in_the_first_half_of_the_real_model(stem: str) -> None:
    layers = UniEraseHyperParams.from_hparams(stem).layers
    assert list(layers) == list(range(layers[0], layers[-1] + 1))
    assert layers[-1] < DEPTHS[stem] / 2


def test_a_chat_model_forgets_in_chat_form(stem: str) -> None:
    hparams = UniEraseHyperParams.from_hparams(stem)
    assert hparams.prompt_forms == (("plain",) if stem in WITHOUT_CHAT_TEMPLATE else ("chat",))
    assert hparams.chat_template_kwargs == ({"enable_thinking": False} if stem == "qwen3-8b" else {})


def test_the_smallest_model_needs_no_download_for_its_corpus(stem: str) -> None:
    assert (UniEraseHyperParams.from_hparams(stem).mom2_dataset == "self") is (stem == "smollm2-135m")


# --- finding and reading ---------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(HyperParamsError, match=r"Unknown hyper-parameter 'layer'\. Did you mean 'layers'\?.*Known:"):
        UniEraseHyperParams.from_dict({"layer": [1]})


def test_an_unlike_key_gets_no_guess() -> None:
    with pytest.raises(HyperParamsError) as caught:
        UniEraseHyperParams.from_dict({"zzzzzz": 1})
    assert "Did you mean" not in str(caught.value)


def test_a_misspelt_file_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(HyperParamsError, match=r"'smollm2-135'\. Did you mean 'smollm2-135m'\?.*one of: .*gpt2-xl"):
        find_hparams("smollm2-135")


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    hparams = UniEraseHyperParams.from_hparams(written(tmp_path, "layers: [1, 2]\nv_lr: 1e-1\n"))
    assert hparams == UniEraseHyperParams(layers=(1, 2), v_lr=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [1", "not valid YAML"),
        ("- 1", "one mapping of hyper-parameters, not a list"),
        ("", "not nothing"),
        ("fast", "not a text"),
        ("3", "not a whole number"),
        ("0.5", "not a finite number"),
    ],
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(HyperParamsError, match=message):
        UniEraseHyperParams.from_hparams(written(tmp_path, text))


# --- coercion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("v_lr", "1e-1", 0.1),  # how YAML 1.1 reads an exponent without a point
        ("mom2_update_weight", 15000, 15000.0),
        ("mom2_n_samples", "1e5", 100000),
        ("v_num_grad_steps", 20.0, 20),
        ("layers", [4, 5], (4, 5)),
        ("layers", range(2), (0, 1)),
        ("prompt_forms", ["plain", "chat"], ("plain", "chat")),
        ("context_template_length_params", [[5, 3], [10, 2]], ((5, 3), (10, 2))),
        ("context_template_length_params", [], ()),
        ("device", 0, "0"),  # EasyEdit numbers its devices
        ("token_closes_answer", True, True),
    ],
)
def test_values_take_the_declared_type(key: str, given: Any, wanted: Any) -> None:
    got = getattr(UniEraseHyperParams(**{key: given}), key)
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(
    ("key", "given", "wanted"),
    [
        ("v_lr", "fast", "a finite number"),
        ("v_lr", None, "a finite number"),
        ("v_lr", True, "a finite number"),
        ("v_lr", "nan", "a finite number"),
        ("v_weight_decay", float("inf"), "a finite number"),
        ("v_num_grad_steps", 2.5, "a whole number"),
        ("v_num_grad_steps", False, "a whole number"),
        ("v_num_grad_steps", float("inf"), "a whole number"),
        ("layers", 4, "a list of whole numbers"),
        ("layers", "45", "a list of whole numbers"),
        ("layers", [4, "five"], "a whole number"),
        ("prompt_forms", "chat", "a list of texts"),
        ("context_template_length_params", 3, "a list of lists of whole numbers"),
        ("context_template_length_params", [10, 2], "a list of whole numbers"),
        ("token_closes_answer", "true", "true or false"),
        ("token_closes_answer", 1, "true or false"),
        ("chat_template_kwargs", 3, "a mapping"),
        ("solver", ["ridge"], "a text"),
        ("device", None, "a text"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(key: str, given: Any, wanted: str) -> None:
    with pytest.raises(HyperParamsError, match=rf"Hyper-parameter {key} = .* is not {wanted}\.$"):
        UniEraseHyperParams(**{key: given})


# --- choices and ranges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "choices"),
    [
        ("fact_token", "subject_first", "subject_last, last"),
        ("solver", "null space", "ridge, null_space"),
        ("mom2_dtype", "float16", "float32, float64"),
        ("prompt_forms", ("chat", "poem"), "chat, plain"),
        ("prompt_forms", (), "chat, plain"),
    ],
)
def test_a_choice_that_is_none_is_refused_with_the_choices(key: str, given: Any, choices: str) -> None:
    with pytest.raises(HyperParamsError, match=rf"{key} = .*{choices}"):
        UniEraseHyperParams(**{key: given})


@pytest.mark.parametrize("layers", [(-1, 2), (3, 2), (2, 2)])
def test_layers_must_ascend_from_0(layers: tuple[int, ...]) -> None:
    with pytest.raises(HyperParamsError, match="ascending block numbers from 0, each once"):
        UniEraseHyperParams(layers=layers)


@pytest.mark.parametrize("pairs", [[[10]], [[10, 2, 1]], [[0, 2]], [[10, -1]]])
def test_contexts_come_as_pairs(pairs: list[list[int]]) -> None:
    with pytest.raises(HyperParamsError, match=r"pairs \[length, how many\]"):
        UniEraseHyperParams(context_template_length_params=pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key",
    [
        "v_num_grad_steps",
        "v_lr",
        "clamp_norm_factor",
        "mom2_n_samples",
        "mom2_max_length",
        "mom2_update_weight",
        "nullspace_threshold",
        "L2",
        "token_num_steps",
        "token_lr",
        "token_batch_size",
    ],
)
def test_what_nothing_works_without_must_be_positive(key: str) -> None:
    for value in (0, -1):
        with pytest.raises(HyperParamsError, match=f"{key} = .* must be (greater than 0|from 0.001|from 1e-)"):
            UniEraseHyperParams(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "key",
    [
        "v_weight_decay",
        "kl_factor",
        "v_continuation_weight",
        "v_stop_loss",
        "retain_update_weight",
        "retain_key_weight",
        "retain_neighbours",
        "token_guard_margin",
        "token_guard_weight",
        "token_noise",
        "max_batch_tokens",
    ],
)
def test_what_can_be_switched_off_may_be_0_but_not_negative(key: str) -> None:
    assert getattr(UniEraseHyperParams(**{key: 0}), key) == 0  # type: ignore[arg-type]
    with pytest.raises(HyperParamsError, match=f"{key} = .* must not be negative"):
        UniEraseHyperParams(**{key: -1})  # type: ignore[arg-type]


def test_a_token_needs_a_name() -> None:
    with pytest.raises(HyperParamsError, match="unlearning_token must not be empty"):
        UniEraseHyperParams(unlearning_token=" ")


# --- as a value ------------------------------------------------------------------------------------------------------


def test_nothing_can_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        UniEraseHyperParams().v_lr = 1.0  # type: ignore[misc]


def test_replace_changes_what_is_named_and_checks_it() -> None:
    hparams = UniEraseHyperParams(layers=(1,))
    assert hparams.replace(v_lr="3e-1") == UniEraseHyperParams(layers=(1,), v_lr=0.3)
    assert hparams.layers == (1,)
    with pytest.raises(HyperParamsError, match="Did you mean 'v_lr'"):
        hparams.replace(v_Lr=1)


def test_a_trip_through_json_changes_nothing(stem: str) -> None:
    hparams = UniEraseHyperParams.from_hparams(stem)
    back = UniEraseHyperParams.from_dict(json.loads(json.dumps(hparams.as_dict())))
    assert back == hparams
    assert back.fingerprint() == hparams.fingerprint()


def test_a_fingerprint_changes_with_the_named_values_alone() -> None:
    hparams, other = UniEraseHyperParams(), UniEraseHyperParams(v_lr=0.3)
    assert hparams.fingerprint() != other.fingerprint()
    assert hparams.fingerprint("v_lr", "seed") != other.fingerprint("v_lr", "seed")
    assert hparams.fingerprint("seed") == other.fingerprint("seed")
