"""Second moments of a corpus as a thing of their own: kept, resumed, shared by processes, imported, and refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from families import FAMILIES
from small import FORGET, HPARAMS, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from unierase_plugin import cli, unlearn
from unierase_plugin.errors import EditError
from unierase_plugin.methods.editing import engine as erasure
from unierase_plugin.methods.editing import goals
from unierase_plugin.models.architecture import Architecture, find_architecture
from unierase_plugin.pipeline import corpus_moment
from unierase_plugin.statistics import collection as second_moment
from unierase_plugin.statistics import corpus
from unierase_plugin.statistics import files as moment_files
from unierase_plugin.statistics import second_moment as statistics
from unierase_plugin.statistics.corpus import corpus_identity, corpus_tokens
from unierase_plugin.statistics.files import check_likeness, diagonal_likeness
from unierase_plugin.statistics.second_moment import SecondMoment, add_sequences, begin_sums, mean_moments
from unierase_plugin.storage.cache import Store
from unierase_plugin.storage.tensor_files import Packed, read_tensors, write_tensors

TEXTS = [
    "The cat sat on a mat, and then it did so again.",
    "Rain fell all day.",
    "A",
    "Seven ships sailed, and six came.",
    "Why did the bell ring at noon?",
    "Tin melts early.",
    "Nobody knows the name of the third king of that land.",
]
SETTINGS = HPARAMS.replace(mom2_n_samples=20, max_batch_tokens=24)
SEQUENCES = [list(text.encode()) for text in TEXTS]


class KilledError(Exception):
    """Stands for whatever ends a pass."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shrink(monkeypatch, tmp_path / "cache")
    # Long enough to show which neurons of a tiny model are strong.
    for module in (erasure, goals):
        monkeypatch.setattr(module, "paragraphs", lambda name: TEXTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(TEXTS))
    return str(path)


@pytest.fixture
def settings(tmp_path: Path) -> str:
    """The hyper-parameters of `moment_of` as a file."""
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(SETTINGS.as_dict()))
    return str(path)


@pytest.fixture
def arch() -> Architecture:
    return find_architecture(FAMILIES["smollm2-135m"]().requires_grad_(False))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many batches went through the model, by whether it was for a corpus."""
    counted: Counter[str] = Counter()
    original = statistics._add_batch

    def counting(*args: Any) -> None:
        counted["batches"] += 1
        original(*args)

    monkeypatch.setattr(statistics, "_add_batch", counting)
    return counted


def moment_of(base: Path, text: str, **changes: Any) -> second_moment.CorpusMoment:
    return corpus_moment(str(base), **{"hparams": SETTINGS, "corpus": text, **changes})


def same(a: Packed, b: Packed) -> None:
    """To the bit; the order in a file may differ."""
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(tensor, b[0][name]) for name, tensor in a[0].items())


def in_npz_layout(folder: Path, moment: SecondMoment, module: str = "model.layers.{}.mlp.down_proj") -> Path:
    """Writes what `layer_stats` of ROME, MEMIT and EasyEdit leaves: sums, their count, and the sample size."""
    place = folder / "model" / "wikipedia_stats"
    place.mkdir(parents=True)
    for layer, mean in moment.moments.items():
        np.savez(
            place / f"{module.format(layer)}_float32_mom2_100.npz",
            **{  # type: ignore[arg-type]
                "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
                "mom2.count": moment.count,
                "mom2.mom2": (mean * moment.count).numpy(),
                "sample_size": 100,
            },
        )
    return folder


# --- the sums ---------------------------------------------------------------------------------------------------------


def test_the_moments_are_symmetric_to_the_bit_and_in_the_dtype_asked_for(arch: Architecture) -> None:
    for dtype in (torch.float32, torch.float64):
        moment = statistics.second_moments(arch, SEQUENCES, (1, 2), max_tokens=30, dtype=dtype).moments[2]
        assert moment.dtype == dtype
        assert torch.equal(moment, moment.T)


def test_sums_lose_nothing_to_a_large_one_before(arch: Architecture) -> None:
    """In float32, a sum of 1e8 would swallow every later term of 1."""
    sums = begin_sums(arch, (1,))
    sums.sums[1].fill_(1e8)
    add_sequences(arch, SEQUENCES, sums, max_tokens=30)
    wanted, count = reference.second_moment(arch, SEQUENCES, 1, 0)
    got = (sums.sums[1].triu() - torch.full_like(wanted, 1e8).triu()) / count
    torch.testing.assert_close(got, wanted.double().triu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_batch_that_the_memory_does_not_hold_is_counted_once(arch: Architecture, failures: int) -> None:
    whole = statistics.second_moments(arch, SEQUENCES, (1, 2), dtype=torch.float64)
    calls = 0

    def too_much(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= failures:
            raise torch.OutOfMemoryError("out of memory")

    # Block 1 is then counted already, and must not be again.
    handle = arch.projections[2].register_forward_pre_hook(too_much)
    # The first failure leaves two halves, the second the halves of one.
    parts = statistics.second_moments(arch, SEQUENCES, (1, 2), dtype=torch.float64)
    handle.remove()
    assert calls == 2 * failures + 1
    assert parts.count == whole.count
    for layer in (1, 2):
        torch.testing.assert_close(parts.moments[layer], whole.moments[layer], rtol=1e-5, atol=1e-6)


def test_shares_add_up_to_the_whole(arch: Architecture) -> None:
    whole, total = begin_sums(arch, (1,)), begin_sums(arch, (1,))
    add_sequences(arch, SEQUENCES, whole, max_tokens=30)
    for rank in range(3):
        share = begin_sums(arch, (1,))
        add_sequences(arch, SEQUENCES, share, max_tokens=30, share=(rank, 3))
        assert 0 < share.batches < whole.batches
        total.sums[1] += share.sums[1]
        total.count += share.count
    assert total.count == whole.count
    torch.testing.assert_close(
        mean_moments(total, torch.float64).moments, mean_moments(whole, torch.float64).moments, rtol=1e-12, atol=1e-14
    )


# --- kept, and gone on with -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["file", "self"])
def test_a_run_takes_what_stats_left_and_the_other_way_round(
    base: Path, text: str, spec: str, passes: Counter[str]
) -> None:
    settings: dict[str, Any] = {
        "hparams": HPARAMS.replace(retain_update_weight=0),
        "corpus": text if spec == "file" else "self",
    }
    found = corpus_moment(str(base), **settings)
    assert found.counting > 0
    kept = read_tensors(found.file)
    passes.clear()
    unlearn(str(base), FORGET, **settings)
    assert not passes
    again = corpus_moment(str(base), **settings)
    assert (again.reading, again.counting, passes) == (0.0, 0.0, Counter())
    found.file.unlink()
    unlearn(str(base), FORGET, **settings)
    assert passes
    same(read_tensors(found.file), kept)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("spec", ["file", "self"])
def test_a_stopped_pass_goes_on_and_gives_the_same_bytes(
    base: Path,
    text: str,
    spec: str,
    batches: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: Counter[str],
) -> None:
    chosen = text if spec == "file" else "self"
    monkeypatch.setattr(second_moment, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(statistics, "SAVING_SHARE", float("inf"))
    undisturbed = moment_of(base, chosen)
    wanted, total = read_tensors(undisturbed.file), passes["batches"]
    undisturbed.file.unlink()
    passes.clear()
    original = Store.put

    def stopping(where: Store, kind: str, key: str, tensors: Any, metadata: Any) -> None:
        original(where, kind, key, tensors, metadata)
        if kind == second_moment.UNDER_WAY and passes["batches"] == batches:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", stopping)
        with pytest.raises(KilledError):
            moment_of(base, chosen)
    assert not undisturbed.file.exists()
    passes.clear()
    # What was read is kept as well: sampling would take as long as the pass.
    monkeypatch.setattr(second_moment, "corpus_tokens", None)
    same(read_tensors(moment_of(base, chosen).file), wanted)
    assert passes["batches"] == total - batches > 0
    assert list((tmp_path / "cache" / second_moment.UNDER_WAY).iterdir()) == []


def test_a_second_start_divides_the_texts_as_the_first_did(
    base: Path, text: str, monkeypatch: pytest.MonkeyPatch, passes: Counter[str]
) -> None:
    """Where the size of a batch follows the memory that is free, which is another one then."""
    monkeypatch.setattr(second_moment, "KEEP_EVERY", 0.0)
    monkeypatch.setattr(statistics, "SAVING_SHARE", float("inf"))
    monkeypatch.setattr(second_moment, "mean_moments", lambda *args: (_ for _ in ()).throw(KilledError))
    counted = []
    for free in (24, 200):
        monkeypatch.setattr("unierase_plugin.models.loaded.fitting_tokens", lambda model, free=free: free)
        with pytest.raises(KilledError):
            moment_of(base, text, hparams=SETTINGS.replace(max_batch_tokens=0))
        counted.append(passes.pop("batches", 0))
    assert counted[0] > 1
    assert counted[1] == 0


def test_sums_of_other_batches_are_not_gone_on_with(
    base: Path, text: str, monkeypatch: pytest.MonkeyPatch, passes: Counter[str]
) -> None:
    monkeypatch.setattr(second_moment, "KEEP_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(second_moment, "mean_moments", lambda *args: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            moment_of(base, text)
    passes.clear()
    other = moment_of(base, text, hparams=SETTINGS.replace(max_batch_tokens=48))
    assert passes["batches"] > 0
    assert other.moment.count == sum(min(24, len(each)) for each in SEQUENCES if len(each) > 1)


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_count_what_one_does(base: Path, text: str, settings: str, tmp_path: Path) -> None:
    alone = moment_of(base, text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "UNIERASE_CACHE": str(tmp_path / "processes"),
    }
    command = [
        sys.executable,
        "-m",
        "unierase_plugin",
        "stats",
        "--model",
        str(base),
        "--hparams",
        settings,
        "--corpus",
        text,
        "--json",
    ]
    both = [
        subprocess.Popen(
            command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    # The first process alone speaks and writes.
    assert said[1][0] == ""
    figures = json.loads(said[0][0])
    assert figures["tokens"] == alone.moment.count
    (file,) = (tmp_path / "processes").rglob("*.safetensors")
    assert str(file) == figures["file"]
    kept = read_tensors(file)[0]
    for layer, moment in alone.moment.moments.items():
        torch.testing.assert_close(kept[f"moments.{layer}"], moment, rtol=1e-6, atol=1e-7)


# --- imported ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["root", "model", "dataset", "files", "own"])
def test_imported_moments_are_those_that_were_written(
    base: Path, text: str, form: str, settings: str, tmp_path: Path
) -> None:
    computed = moment_of(base, text)
    root = in_npz_layout(tmp_path / "stats", computed.moment)
    in_npz_layout(root / "another", SecondMoment({1: torch.eye(3)}, 5))
    if form == "own":
        options = ["--hparams", settings, "--corpus", text, "--out", str(tmp_path / "own.safetensors")]
        assert CliRunner().invoke(cli.app, ["stats", "--model", str(base), *options]).exit_code == 0
    sources = {
        "root": [root],
        "model": [root / "model"],
        "dataset": [root / "model" / "wikipedia_stats"],
        "files": sorted((root / "model").rglob("*.npz")),
        "own": [tmp_path / "own.safetensors"],
    }[form]
    computed.file.unlink()
    taken = moment_of(base, text, sources=sources)
    assert taken.file == computed.file
    assert taken.moment.count == computed.moment.count
    for layer, moment in computed.moment.moments.items():
        torch.testing.assert_close(taken.moment.moments[layer], moment, rtol=1e-6, atol=1e-6)
    assert {Path(path).suffix for path in taken.source["imported"].values()} <= {".npz", ".safetensors"}
    later = moment_of(base, text)
    assert (later.counting, later.source) == (0.0, taken.source)


def test_a_file_of_several_statistics_of_a_whole_corpus_is_read(base: Path, text: str, tmp_path: Path) -> None:
    """Its name lists them, and has no sample size."""
    computed = moment_of(base, text)
    root = in_npz_layout(tmp_path / "stats", computed.moment)
    for path in list(root.rglob("*.npz")):
        path.rename(path.with_name(path.name.replace("_mom2_100", "_mean-mom2-norm_mean")))
    assert moment_of(base, text, sources=[root]).moment.count == computed.moment.count


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("layer", "no statistics of block 2 in .*; there is block 1"),
        (
            "module",
            "no statistics of block 1, 2 in .*transformer.h.1.mlp.c_proj.*Wanted: model.layers.1.mlp",
        ),
        ("width", "is of shape \\(63, 63\\); block 1 of this model has keys of width 64"),
        ("keys", "holds mom2.count, not mom2.mom2 and mom2.count"),
        ("nan", "holds NaN or infinity"),
        ("asymmetric", "is no second moment"),
        ("count", "different numbers of tokens: 7 in block 1"),
        ("cut short", "is damaged or no .npz file"),
        ("twice", "several statistics of block 1"),
        ("another model", "are not of block 1 of this model"),
        ("neighbours", "are not of block 1 of this model"),
        ("nowhere", "no file or folder"),
        ("named", "does not tell what it holds"),
    ],
)
def test_what_is_no_statistic_of_this_model_is_refused(
    base: Path, text: str, damage: str, said: str, tmp_path: Path
) -> None:
    computed = moment_of(base, text)
    moments = dict(computed.moment.moments)
    module = "transformer.h.{}.mlp.c_proj" if damage == "module" else "model.layers.{}.mlp.down_proj"
    if damage == "width":
        moments[1] = moments[1][:63, :63]
    if damage == "nan":
        moments[1] = moments[1] * torch.nan
    if damage == "asymmetric":
        moments[1] = moments[1] + moments[1].triu(1)
    if damage == "another model":
        moments[1] = moments[1][order := torch.randperm(64, generator=torch.Generator().manual_seed(0))][:, order]
    if damage == "neighbours":
        moments = {1: moments[2], 2: moments[1]}
    if damage == "layer":
        del moments[2]
    root = in_npz_layout(tmp_path / "stats", SecondMoment(moments, computed.moment.count), module)
    sources, first = [root], min(root.rglob("*.npz"))
    if damage == "keys":
        np.savez(first, **{"mom2.count": 5})  # type: ignore[arg-type]
    if damage == "count":
        np.savez(first, **{"mom2.count": 7, "mom2.mom2": moments[1].numpy()})  # type: ignore[arg-type]
    if damage == "cut short":
        first.write_bytes(first.read_bytes()[:300])
    if damage == "twice":
        first.with_name(first.name.replace("_100", "_200")).write_bytes(first.read_bytes())
    if damage == "nowhere":
        sources = [tmp_path / "nothing"]
    if damage == "named":
        sources = [first.rename(first.with_name("statistics.npz"))]
    with pytest.raises(EditError, match=said):
        moment_of(base, text, sources=sources)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["out", "cache"])
def test_a_file_of_this_package_says_which_model_it_is_of(
    base: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, dtype: str
) -> None:
    """Chance likens the diagonals of a narrow model, so that their pattern tells little of a model of width 64."""
    monkeypatch.setattr(moment_files, "LEAST_LIKENESS", 100.0)
    out = tmp_path / "own.safetensors"
    computed = moment_of(base, text, out=out, dtype=dtype)
    if kept == "cache":
        out.write_bytes(computed.file.read_bytes())
    computed.file.unlink()
    taken = moment_of(base, text, sources=[out], dtype=dtype)
    for layer, moment in computed.moment.moments.items():
        assert torch.equal(taken.moment.moments[layer], moment)
    another = save_base(tmp_path / "another", tiny_model(seed=3))
    with pytest.raises(EditError, match="are not of block 1 of this model"):
        moment_of(another, text, sources=[out], dtype=dtype)
    tensors, metadata = read_tensors(out)
    write_tensors(out, tensors, {name: each for name, each in metadata.items() if "fingerprint" not in name})
    with pytest.raises(EditError, match="are not of block 1 of this model"):
        moment_of(base, text, sources=[out], dtype=dtype)


def test_likeness_is_of_the_pattern_and_not_of_the_size() -> None:
    pattern = torch.diag(torch.arange(1.0, 40.0))
    assert diagonal_likeness(pattern, 100 * pattern) == pytest.approx(1.0)
    assert diagonal_likeness(pattern, pattern.flip(0).flip(1)) < 0
    check_likeness(SecondMoment({0: pattern}, 1), SecondMoment({0: pattern + 1}, 1), {0: "file"})


# --- corpora ----------------------------------------------------------------------------------------------------------


def rows(read: list[int]) -> Iterator[dict[str, Any]]:
    for index in range(10**6):
        read.append(index)
        yield {"id": index, "text": f"Text number {index}." if index % 3 else ""}


def test_no_more_of_a_dataset_is_read_than_samples_need(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert (name, config, split, streaming) == ("some/set", "en", "train", True)
        return rows(read)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    monkeypatch.setattr(corpus, "TEXT_GROUP", 3)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    found = corpus_tokens("some/set:en", model, tokenizer, samples=10, max_length=8, seed=0)
    assert len(found) == 10
    assert [list(ids) for ids in found[:2]] == [tokenizer(f"Text number {i}.")["input_ids"][:8] for i in (1, 2)]
    assert len(read) == 15
    with pytest.raises(EditError, match=r"no column 'body'. Name one of 'id', 'text', as in some/set:en:COLUMN"):
        corpus_tokens("some/set:en:body", model, tokenizer, samples=1, max_length=8, seed=0)


def test_a_stream_that_breaks_off_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "One."}
        raise ConnectionError("reset")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    with pytest.raises(EditError, match=r"broke off after 1 texts \(ConnectionError: reset\)"):
        corpus_tokens("some/set", tiny_model(), tiny_tokenizer(), samples=10, max_length=8, seed=0)


def test_a_text_file_is_read_by_paragraphs_and_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One\nand more.\n\n \nTwo.\n\n\n\nThree.\n")
    tokenizer = tiny_tokenizer()
    found = corpus_tokens(str(path), tiny_model(), tokenizer, samples=5, max_length=50, seed=0)
    assert [tokenizer.decode(list(ids)) for ids in found] == ["One\nand more.", "Two.", "Three."]
    before = corpus_identity(str(path))
    path.write_text("One")
    assert corpus_identity(str(path)) != before
    assert corpus_identity("some/set") == corpus_identity("self") == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_figures(base: Path, text: str, tmp_path: Path) -> None:
    arguments = ["stats", "--model", str(base), "--corpus", text, "--layers", "0,2", "--samples", "3"]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "mean eigenvalue" in shown.stdout
    assert "s to count" in shown.stdout
    figures = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert figures["blocks"].keys() == {"0", "2"}
    assert figures["seconds"] == {"reading": 0.0, "counting": 0.0}
    assert Path(figures["file"]).is_relative_to(tmp_path / "cache" / "statistics")
    wanted, _ = reference.second_moment(
        find_architecture(tiny_model()), [tiny_tokenizer()(each)["input_ids"] for each in TEXTS[:2] + TEXTS[3:4]], 2, 0
    )
    assert figures["blocks"]["2"]["mean_eigenvalue"] == pytest.approx(float(wanted.trace()) / 64, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "1-x"], "is not a list of blocks. Write it as 3-7 or 3,5,7"),
        (["--layers", "1-9"], "the model has 4 blocks"),
        (["--out", "file.npz"], "must end in .safetensors"),
        (["--samples", "-1"], "mom2_n_samples = -1 must be greater than 0"),
    ],
)
def test_what_the_command_refuses(base: Path, arguments: list[str], said: str) -> None:
    refused = CliRunner().invoke(cli.app, ["stats", "--model", str(base), *arguments])
    assert refused.exit_code == 1
    assert said in " ".join(refused.output.split())
