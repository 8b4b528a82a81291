"""The cache: what keys it, what goes in comes out, and what happens when the disk or a file is bad."""

from __future__ import annotations

import errno
import logging
import os
import struct
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from tiny import tiny_model, tiny_tokenizer

from unierase_plugin.errors import CheckpointError, WriteError
from unierase_plugin.locate_then_edit.values import Values
from unierase_plugin.statistics.second_moment import SecondMoment
from unierase_plugin.storage import atomic, tensor_files
from unierase_plugin.storage.atomic import check_disk_space, replace_folder, write_text
from unierase_plugin.storage.cache import Store, cache_folder
from unierase_plugin.storage.digests import HASH_CHUNK, content_digests
from unierase_plugin.storage.fingerprints import digest, model_fingerprint, plain, tokenizer_fingerprint
from unierase_plugin.storage.tensor_files import pack, read_tensors, unpack, write_tensors
from unierase_plugin.unlearning_token import UnlearningToken

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def no_room(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_cache_folder_is_the_first_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNIERASE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "unierase"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/unierase")
    monkeypatch.setenv("UNIERASE_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder("/given") == Path("/given")


# --- Fingerprints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_of_one_weight_changes_the_fingerprint(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    before = model_fingerprint(model)
    assert before == model_fingerprint(tiny_model(dtype=dtype))
    weight = model.model.layers[2].mlp.down_proj.weight.data.view(torch.uint8)
    weight[7, 11] ^= 1
    assert model_fingerprint(model) != before
    weight[7, 11] ^= 1
    assert model_fingerprint(model) == before


def test_the_fingerprint_stays_what_written_records_hold() -> None:
    """Every edited folder is checked against it: another definition would make them all look tampered with."""
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.5]])
    entry = b'["weight", "torch.float32", [1, 2]]' + sha256(struct.pack("<2f", 1.0, -2.5)).digest()
    assert model_fingerprint(model) == sha256(b"Linear" + entry).hexdigest()
    assert model_fingerprint(model).startswith("ccd32148ec3db09e")


def test_the_fingerprint_does_not_depend_on_order_and_layout() -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    inner = model.model._modules
    inner["layers"] = inner.pop("layers")
    inner["embed_tokens"] = inner.pop("embed_tokens")
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert model_fingerprint(model) == before


def test_a_tensor_longer_than_a_chunk_has_the_digest_of_its_bytes() -> None:
    tensor = torch.arange(HASH_CHUNK // 4 + 10_001, dtype=torch.float32).reshape(-1, 1)
    assert list(content_digests([tensor])) == [sha256(tensor.numpy().tobytes()).digest()]


def test_the_fingerprint_tells_dtypes_shapes_names_and_types_apart() -> None:
    prints = [
        model_fingerprint(each)
        for each in (
            tiny_model(),
            tiny_model(tied=False),
            tiny_model(dtype=torch.bfloat16),
            tiny_model("mistral"),
            tiny_model(vocabulary=261),
            tiny_model(seed=1),
        )
    ]
    assert len(set(prints)) == len(prints)


def test_tied_weights_count_once_under_either_order_of_their_names() -> None:
    tied = tiny_model(tied=True)
    assert model_fingerprint(tied, ["lm_head.weight", "model.embed_tokens.weight"]) == model_fingerprint(
        tied, ["lm_head.weight"]
    )


def test_named_weights_alone_count() -> None:
    model = tiny_model()
    names = [name for name, _ in model.named_parameters() if ".layers.0." in name]
    before = model_fingerprint(model, names)
    model.model.layers[1].mlp.down_proj.weight.data.add_(1)
    assert model_fingerprint(model, reversed(names)) == before
    model.model.layers[0].mlp.down_proj.weight.data.add_(1)
    assert model_fingerprint(model, names) != before


def test_unknown_and_offloaded_weights_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(CheckpointError, match=r"model.norm.wait.*Did you mean 'model.norm.weight'"):
        model_fingerprint(model, ["model.norm.wait"])
    with pytest.raises(CheckpointError, match="without offloading"):
        model_fingerprint(model.to("meta"))


def test_a_tokenizer_is_what_it_does_to_text_and_not_how_it_was_called_last() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before == tokenizer_fingerprint(tiny_tokenizer())
    assert tokenizer_fingerprint(tiny_tokenizer(add_bos=True)) != before
    assert tokenizer_fingerprint(tiny_tokenizer(chat=False)) != before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans())))
def test_a_digest_forgets_the_order_of_keys_alone(values: dict) -> None:
    assert digest(values, "a") == digest(dict(reversed(values.items())), "a")
    assert digest(values, "a") != digest("a", values)
    assert digest([1, 2]) != digest([2, 1])


def test_a_digest_tells_parts_apart_and_refuses_what_has_no_stable_text() -> None:
    parts = [
        ("ab",),
        ("a", "b"),
        (b"ab",),
        (["a", "b"],),
        ({"a": "b"},),
        ("1",),
        (1,),
        (Path("ab"), 1),
        (torch.float32,),
    ]
    assert len({digest(*part) for part in parts}) == len(parts)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no stable text"):
        digest(object())  # type: ignore[arg-type]


def test_plain_gives_what_every_json_reader_takes() -> None:
    token = UnlearningToken("<u>", 3, torch.ones(2), None, float("nan"), 1)
    wanted = {
        "name": "<u>",
        "id": 3,
        "input_row": [1.0, 1.0],
        "output_row": None,
        "loss": None,
        "steps": 1,
        "leak": None,
    }
    assert plain(token) == wanted
    assert plain({1: {2, 1}, "p": Path("x"), "t": torch.tensor(2)}) == {"1": [1, 2], "p": "x", "t": 2}


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_tensors_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.randn(3, 4) * 5).to(dtype)
    tensors = {"a": base, "view": base.T, "shared": base[:2], "scalar": base[0, 0], "none": base[:0]}
    write_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"é": "ü"})
    back, metadata = read_tensors(tmp_path / "deep" / "x.safetensors")
    assert metadata == {"é": "ü"}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor)
    assert os.listdir(tmp_path / "deep") == ["x.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_cut_short_is_named_with_the_remedy(tmp_path: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    cache = Store(tmp_path)
    cache.put("moments", "k1", {"a": torch.zeros(50)}, {})
    path = cache.path("moments", "k1")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"k1\.safetensors.*damaged or cut short"):
        read_tensors(path)
    with caplog.at_level(logging.WARNING):
        assert cache.get("moments", "k1") is None
    assert "k1.safetensors" in caplog.text
    cache.put("moments", "k1", {"a": torch.ones(2)}, {})
    found = cache.get("moments", "k1")
    assert found is not None
    assert torch.equal(found[0]["a"], torch.ones(2))


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_that_turned_round_is_computed_again(tmp_path: Path, bit: int, caplog: pytest.LogCaptureFixture) -> None:
    """A cached token or statistic that is not what was kept would do silent damage to every later run."""
    cache, kept = Store(tmp_path), ({"a": torch.arange(50.0), "b": torch.ones(3, 2)}, {"name": "x", "count": "7"})
    cache.put("moments", "k", *kept)
    path = cache.path("moments", "k")
    data = path.read_bytes()
    for at in range(bit, len(data), 8):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        found = cache.get("moments", "k")
        if found is not None:  # white space, or the name under which the digests are
            assert {name: text for name, text in found[1].items() if name in kept[1]} == kept[1], at
            assert all(torch.equal(found[0][name], tensor) for name, tensor in kept[0].items()), at
    again, _ = cache.cached("moments", "k", lambda: kept)
    assert torch.equal(again["a"], kept[0]["a"])
    assert "Computing again" in caplog.text
    assert "is not what was written" in caplog.text


def test_a_file_without_digests_is_read(tmp_path: Path) -> None:
    tensor_files.save_file({"a": torch.ones(2)}, tmp_path / "x", {"name": "earlier"})  # type: ignore[attr-defined]
    found, told = read_tensors(tmp_path / "x")
    assert torch.equal(found["a"], torch.ones(2))
    assert told == {"name": "earlier"}


def test_noise_and_missing_files_are_checkpoint_errors(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(os.urandom(500))
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no file"):
        read_tensors(tmp_path / "y")
    assert Store(tmp_path).get("moments", "k") is None


@pytest.mark.parametrize("broken", ["save_file", "os.fsync", "os.replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    cache = Store(tmp_path)
    cache.put("values", "k", {"a": torch.zeros(1)}, {})
    target = tensor_files if broken == "save_file" else os
    monkeypatch.setattr(target, broken.removeprefix("os."), no_room)
    with pytest.raises(CheckpointError, match=r"No space left.*0\.40 MB.* free"):
        write_tensors(cache.path("values", "k"), {"a": torch.ones(100_000)}, {})
    cache.put("values", "k", {"a": torch.ones(1)}, {})  # a cache that cannot be written must not end a run
    monkeypatch.undo()
    assert "Not kept" in caplog.text
    found = cache.get("values", "k")
    assert found is not None
    assert torch.equal(found[0]["a"], torch.zeros(1))
    assert os.listdir(tmp_path / "values") == ["k.safetensors"]


def test_what_the_tensor_library_says_of_a_full_disk_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1)}, {})


def test_leftovers_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    cache = Store(tmp_path)
    kind = tmp_path / "values"
    kind.mkdir()
    (kind / ".a.safetensors.writing-999999999-1").touch()
    (kind / f".b.safetensors.writing-{os.getppid()}-1").touch()
    cache.put("values", "k", {"a": torch.zeros(1)}, {})
    assert sorted(os.listdir(kind)) == [f".b.safetensors.writing-{os.getppid()}-1", "k.safetensors"]


def test_what_a_killed_writer_of_a_file_left_goes_with_the_next_and_nothing_else(tmp_path: Path) -> None:
    """Beside a file of the user's choice lie files of others."""
    others = [".b.txt.writing-999999999-1", f".a.txt.writing-{os.getppid()}-1", "a.txt.writing-999999999-1"]
    for name in (".a.txt.writing-999999999-1", *others):
        (tmp_path / name).touch()
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted(["a.txt", *others])


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".hidden", "a b"])
def test_a_key_is_a_file_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match="file name"):
        Store(tmp_path).get("values", key)


# --- Dataclasses -----------------------------------------------------------------------------------------------------


def test_dataclasses_come_back_as_they_were(tmp_path: Path) -> None:
    cache = Store(tmp_path)
    token = UnlearningToken("<unlearn_0>", 260, torch.randn(8), None, 0.1 + 0.2, 60)
    moment = SecondMoment({3: torch.randn(4, 4, dtype=torch.float64), 12: torch.randn(4, 4)}, 7)
    values = Values(torch.randn(2, 8), torch.rand(2), torch.rand(2), torch.rand(2), torch.tensor([3, 4]))
    cache.put("token", "k", *pack(token))
    cache.put("moment", "k", *pack(moment))
    cache.put("values", "k", *pack(values))
    back = unpack(UnlearningToken, *cache.get("token", "k"))  # type: ignore[misc]
    assert (back.name, back.id, back.output_row, back.loss, back.steps) == ("<unlearn_0>", 260, None, token.loss, 60)
    assert torch.equal(back.input_row, token.input_row)
    again = unpack(SecondMoment, *cache.get("moment", "k"))  # type: ignore[misc]
    assert again.count == 7
    assert list(again.moments) == [3, 12]
    assert all(torch.equal(again.moments[layer], moment.moments[layer]) for layer in (3, 12))
    assert again.moments[3].dtype == torch.float64
    third = unpack(Values, *cache.get("values", "k"))  # type: ignore[misc]
    assert torch.equal(third.states, values.states)
    assert torch.equal(third.steps, values.steps)


def test_a_file_of_another_kind_or_version_is_refused() -> None:
    values = pack(Values(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1).long()))
    with pytest.raises(CheckpointError, match="does not hold SecondMoment"):
        unpack(SecondMoment, *values)
    values[0].pop("steps")
    with pytest.raises(CheckpointError, match="does not hold Values as this version"):
        unpack(Values, *values)
    with pytest.raises(CheckpointError, match="does not hold UnlearningToken"):
        unpack(UnlearningToken, {}, {})


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, error: type[BaseException], existed: bool) -> None:
    folder = tmp_path / "out"
    if existed:
        folder.mkdir()
        (folder / "old").touch()
    expected = CheckpointError if error is OSError else error

    def fail() -> None:
        with replace_folder(folder, 0) as staging:
            (staging / "new").touch()
            raise error

    with pytest.raises(expected):
        fail()
    assert os.listdir(tmp_path) == (["out"] if existed else [])
    with replace_folder(folder, 0) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "new").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(folder) == ["sub"]


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"too little room.*1000000000\.00 GB"),
        replace_folder(tmp_path / "o", 10**18),
    ):
        pytest.fail("nothing is to be written")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("at", ["write", "sync", "rename"])
def test_a_file_that_cannot_be_written_is_as_it_was(
    old: bytes | None, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with monkeypatch.context() as patch:
        place, name = {"write": (Path, "write_bytes"), "sync": (os, "fsync"), "rename": (os, "replace")}[at]
        patch.setattr(place, name, no_room)
        with pytest.raises(WriteError, match=r"No space left.*unchanged.*are free"):
            write_text(path, "new")
    assert os.listdir(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old
    write_text(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert os.listdir(tmp_path) == ["file"]


def test_room_is_asked_for_where_the_folder_is_to_be(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(WriteError, match=r"1000000000\.00 GB.*are free in.*Nothing was done"):
        check_disk_space(tmp_path / "not" / "there", 10**18)
    assert os.listdir(tmp_path) == []


def test_the_only_whole_version_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced-999999999").mkdir()
    (tmp_path / ".out.replaced-999999999" / "old").touch()
    (tmp_path / ".out.writing-999999999").mkdir()
    atomic.clear_leftovers(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


@pytest.mark.parametrize("removal", ["replace_folder", "remove_folder"])
def test_a_stop_while_a_folder_goes_leaves_nothing_of_it(
    removal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, unlink, calls = tmp_path / "out", os.unlink, []
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text("old")

    def stopped(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        unlink(*args, **kwargs)  # type: ignore[arg-type]

    def replaced() -> None:
        with replace_folder(folder, 0) as staging:
            (staging / "new").write_text("new")

    monkeypatch.setattr(os, "unlink", stopped)
    with pytest.raises(KeyboardInterrupt):
        atomic.remove_folder(folder) if removal == "remove_folder" else replaced()
    left = [] if removal == "remove_folder" else ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert removal == "remove_folder" or [path.name for path in folder.iterdir()] == ["new"]
