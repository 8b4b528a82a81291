"""A whole audit of a tiny edited model: what it writes, what it keeps, and how it goes on after being stopped."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from audited import KEPT, SIZES, TOKEN
from installed import installer
from safetensors.torch import load_file, save_file
from small import FORGET, FORGET_MORE, FORGET_OTHERS, HPARAMS, RETAIN, save_base, shrink
from tiny import tiny_model
from typer.testing import CliRunner

from unierase_plugin import unlearn
from unierase_plugin.audit import runner
from unierase_plugin.audit.attacks import ATTACKS
from unierase_plugin.audit.contract import GROUPS
from unierase_plugin.audit.page import page
from unierase_plugin.audit.runner import audit
from unierase_plugin.audit.sources import REBUILT, open_audited
from unierase_plugin.cli import app
from unierase_plugin.errors import CheckpointError, PluginError, RequestError, UniEraseError, WriteError
from unierase_plugin.models.loading import load
from unierase_plugin.plugins.registration import registry
from unierase_plugin.storage.fingerprints import model_fingerprint
from unierase_plugin.storage.locks import folder_lock

WORDS = ("removed", "suppressed", "not forgotten", "model damaged")
MODELS = {"edited", "unedited", "reference"}
FEW = ("prefill", "token-ban", "membership", "retention", "ordinary-text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, root / "cache")
        unlearn(save_base(root / "base"), [*FORGET, *FORGET_MORE], retain=RETAIN, hparams=HPARAMS, out=root / "edited")
    save_base(root / "reference", tiny_model(seed=5))
    return root


def audited(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {"retain": RETAIN, "sizes": SIZES, "attacks": FEW, **changes}
    return audit(folder / "edited", [*FORGET, *FORGET_MORE], out=out, **settings)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every attack on all three models."""
    out = tmp_path_factory.mktemp("whole") / "audit"
    kept = [*RETAIN, *({"question": each.question, "answer": each.answer} for each in KEPT)]
    audited(folder, out, attacks=(), retain=kept, reference=folder / "reference")
    return out


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each attack has run on each model."""
    counted: Counter[str] = Counter()

    def counting(attack: Any) -> Any:
        def run(subject: Any, context: Any) -> Any:
            counted[f"{subject.role}: {attack.name}"] += 1
            return attack.run(subject, context)

        return replace(attack, run=run)

    original = runner.choose_attacks  # type: ignore[attr-defined]
    monkeypatch.setattr(runner, "choose_attacks", lambda *given: tuple(map(counting, original(*given))))
    return counted


# --- what it writes --------------------------------------------------------------------------------------------------


def test_a_whole_audit(whole: Path) -> None:
    report = json.loads((whole / "audit.json").read_text(encoding="utf-8"))
    assert report["verdict"].startswith(WORDS)
    assert [entry["attack"] for entry in report["not_run"]] == ["paraphrases"]
    assert {entry["group"] for entry in report["attacks"]} == set(GROUPS)
    assert report["token"] == TOKEN
    for entry in report["attacks"]:
        asked = {"edited", "unedited"} if entry["name"] in ("retention", "ordinary-text") else MODELS
        assert set(entry["seconds"]) == asked
    membership = next(entry for entry in report["attacks"] if entry["name"] == "membership")
    assert set(membership["figures"]["edited"]["auc"]) == {
        "loss",
        "zlib",
        "min-k",
        "min-k++",
        "gradient norm",
        "reference",
    }
    theirs = membership["figures"]["reference"]["auc"]
    assert set(membership["figures"]["edited"]["privleak"]) == {name for name, area in theirs.items() if area}
    assert membership["figures"]["reference"]["privleak"] == {}
    # The model taken back is needed no more.
    assert sorted(path.name for path in whole.iterdir()) == ["audit.html", "audit.json", "results"]


def test_the_unedited_model_is_the_base_to_the_bit(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    assert unedited_model(folder, tmp_path / "out") == model_fingerprint(tiny_model())


def test_what_a_stopped_audit_of_another_model_left_is_no_control(
    folder: Path, tmp_path: Path, runs: Counter[str]
) -> None:
    def stop(phase: str, share: float, note: str) -> None:
        if phase == "unedited: plain":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, tmp_path / "cache")
        unlearn(folder / "reference", FORGET, hparams=HPARAMS, out=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        audit(tmp_path / "other", FORGET, out=tmp_path / "out", sizes=SIZES, attacks=("plain",), progress=stop)
    assert list((tmp_path / "out").glob(f"{REBUILT}*"))
    assert unedited_model(folder, tmp_path / "out") == model_fingerprint(tiny_model())


def unedited_model(folder: Path, out: Path) -> str:
    """Fingerprint of the model that an audit takes as the unedited one."""
    seen = []
    original = runner.attack_model  # type: ignore[attr-defined]

    def look(state: Any, sources: Any, role: str, *rest: Any, **options: Any) -> None:
        if role == "unedited":
            seen.append(open_audited(sources, role, token="", device="", dtype="").loaded.fingerprint)
        original(state, sources, role, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "attack_model", look)
        audited(folder, out, attacks=("plain",))
    [found] = seen
    return found


def test_a_folder_that_cannot_be_taken_back_is_refused_before_the_first_attack(
    folder: Path, tmp_path: Path, runs: Counter[str]
) -> None:
    shutil.copytree(folder / "edited", tmp_path / "edited")
    weights = load_file(tmp_path / "edited" / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "edited" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="--base"):
        audited(tmp_path, tmp_path / "out", attacks=("plain",))
    assert not runs


def test_what_was_not_run_comes_first_and_forbids_removed(folder: Path, tmp_path: Path) -> None:
    report = audited(folder, tmp_path / "out")
    named = [entry["attack"] for entry in report["not_run"]]
    # The chat template has no thinking part.
    assert set(named) == {attack.name for attack in ATTACKS} - {"plain", "thinking", *FEW}
    text = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert text.index("What was not run") < text.index('class="box verdict')
    assert not report["verdict"].startswith("removed")
    assert any("quantise" in doubt for doubt in report["doubts"])


# --- resume ----------------------------------------------------------------------------------------------------------


def test_nothing_runs_twice(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    first = audited(folder, tmp_path / "out")
    before = dict(runs)
    assert set(before.values()) == {1}
    second = audited(folder, tmp_path / "out")
    assert dict(runs) == before
    unlike = ("peak_memory_bytes",)
    assert {k: v for k, v in first.items() if k not in unlike} == {k: v for k, v in second.items() if k not in unlike}


@pytest.mark.parametrize("change", [{"seed": 1}, {"sizes": replace(SIZES, answer_most=5)}, {"retain": FORGET_OTHERS}])
def test_another_audit_runs_again(folder: Path, tmp_path: Path, runs: Counter[str], change: dict[str, Any]) -> None:
    audited(folder, tmp_path / "out", attacks=("prefill",))
    audited(folder, tmp_path / "out", attacks=("prefill",), **change)
    assert runs["edited: prefill"] == 2


def test_another_model_under_the_same_name_runs_again(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    for number, name in enumerate(("base", "reference", "reference"), start=1):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(folder / name, tmp_path / "model")
        audit(tmp_path / "model", FORGET, base=folder / "base", sizes=SIZES, out=tmp_path / "out", attacks=("plain",))
        assert runs["edited: plain"] == min(number, 2)
    assert runs["unedited: plain"] == 1


def test_another_control_runs_again_what_is_compared_with_it(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    for reference in (None, folder / "reference", folder / "base"):
        audited(folder, tmp_path / "out", attacks=("membership",), reference=reference)
    assert runs["edited: membership"] == 3


def test_a_stopped_audit_goes_on(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    def stop(phase: str, share: float, note: str) -> None:
        if phase == "edited: prefill" and share < 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audited(folder, tmp_path / "out", attacks=("prefill",), progress=stop)
    audited(folder, tmp_path / "out", attacks=("prefill",))
    assert runs == {"unedited: plain": 1, "unedited: prefill": 1, "edited: plain": 1, "edited: prefill": 2}


def test_a_damaged_result_is_computed_again(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    audited(folder, tmp_path / "out", attacks=("prefill",))
    part = tmp_path / "out" / "results" / "edited.prefill.json"
    part.write_text(part.read_text(encoding="utf-8")[:40], encoding="utf-8")
    audited(folder, tmp_path / "out", attacks=("prefill",))
    assert runs["edited: prefill"] == 2
    assert runs["edited: plain"] == 1


def test_a_changed_result_is_computed_again(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    audited(folder, tmp_path / "out", attacks=("prefill",))
    part = tmp_path / "out" / "results" / "edited.prefill.json"
    text = part.read_text(encoding="utf-8")
    part.write_text(re.sub(r"0\.0", "1.0", text, count=1), encoding="utf-8")
    assert part.read_text(encoding="utf-8") != text
    audited(folder, tmp_path / "out", attacks=("prefill",))
    assert runs["edited: prefill"] == 2
    assert runs["edited: plain"] == 1


@pytest.mark.parametrize("damage", ["gone", "cut short", "removed in part"])
def test_an_unedited_model_that_is_not_whole_is_taken_back_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    out = tmp_path / "out"

    def stop(phase: str, share: float, note: str) -> None:
        if phase == "unedited: plain" and damage != "removed in part":
            raise KeyboardInterrupt

    def stop_removing(place: Any, *args: Any, **options: Any) -> None:
        (Path(place) / "config.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_page", lambda *_: patch.setattr("shutil.rmtree", stop_removing))
        with pytest.raises(KeyboardInterrupt):
            audited(folder, out, attacks=("plain",), progress=stop)
    if damage != "removed in part":
        [weights] = out.glob(f"{REBUILT}-*/model.safetensors")
        weights.unlink() if damage == "gone" else weights.write_bytes(weights.read_bytes()[:-8])
    assert audited(folder, out, attacks=("plain",))["verdict"]
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json", "results"]


def test_one_audit_at_a_time_writes_into_a_folder(folder: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out"), pytest.raises(CheckpointError, match="is being written by"):
        audited(folder, tmp_path / "out")


@pytest.mark.parametrize("name", ["edited.plain.json", "audit.json", "audit.html"])
def test_a_full_disk_leaves_no_half_of_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, out = Path.write_bytes, tmp_path / "out"

    def full(path: Path, data: bytes) -> int:
        if name in path.name:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(WriteError, match=r"No space left.*Free some room"):
            audited(folder, out, attacks=("plain",))
    assert not [path.name for path in out.rglob("*") if name in path.name]
    audited(folder, out, attacks=("plain",))
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json", "results"]


# --- models at hand --------------------------------------------------------------------------------------------------


def test_a_model_at_hand_is_audited_like_its_folder(folder: Path, tmp_path: Path) -> None:
    chosen = ("prefill", "patching-depth", "ordinary-text")
    loaded = {name: load(str(folder / name)) for name in ("edited", "base", "reference")}
    before = {name: model_fingerprint(model) for name, (model, _) in loaded.items()}
    first, second = (
        audit(
            made["edited"],
            FORGET,
            out=tmp_path / name,
            base=made["base"],
            reference=made["reference"],
            sizes=SIZES,
            attacks=chosen,
        )
        for name, made in (("folder", {name: folder / name for name in loaded}), ("hand", loaded))
    )
    assert {name: model_fingerprint(model) for name, (model, _) in loaded.items()} == before
    for own, theirs in zip(first["attacks"], second["attacks"], strict=True):
        for key in ("name", "shares", "figures", "variants"):
            assert own.get(key) == theirs.get(key)
    assert second["model"] == "a model at hand"
    with pytest.raises(UniEraseError, match="--base"):
        audit(loaded["edited"], FORGET, out=tmp_path / "none")


def test_an_attack_that_proves_impossible_was_not_run(folder: Path, tmp_path: Path) -> None:
    """A reference of another shape cannot be patched; the rest of the audit goes on."""
    save_base(tmp_path / "short", tiny_model(blocks=3))
    report = audited(folder, tmp_path / "out", attacks=("patching-depth",), reference=tmp_path / "short")
    [entry] = [entry for entry in report["not_run"] if entry["attack"] == "patching-depth"]
    assert "other blocks" in entry["why"]
    assert any("patching-depth" in doubt for doubt in report["doubts"])


def test_depth_is_looked_for_again_in_another_unedited_model(folder: Path, tmp_path: Path, runs: Counter[str]) -> None:
    for base in (None, None, folder / "reference"):
        audited(folder, tmp_path / "out", attacks=("patching-depth",), base=base, reference=folder / "reference")
    assert runs["reference: patching-depth"] == 2


# --- models without a record ------------------------------------------------------------------------------------------


def test_a_folder_without_a_record_needs_its_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UniEraseError, match="--base"):
        audit(folder / "base", FORGET, out=tmp_path / "out")
    report = audit(
        folder / "reference", FORGET, base=folder / "base", sizes=SIZES, out=tmp_path / "out", attacks=("ban",)
    )
    assert [entry["attack"] for entry in report["does_not_apply"]] == ["token-ban", "token-rows", "thinking"]
    assert not {"token-ban", "token-rows"} & {entry["attack"] for entry in report["not_run"]}
    assert "prefill" in {entry["name"] for entry in report["attacks"]}


def test_facts_that_were_not_to_be_forgotten_are_noticed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audited(folder, tmp_path / "right", attacks=("plain",))
    assert "names none of these facts" not in caplog.text
    audit(folder / "edited", RETAIN, out=tmp_path / "wrong", sizes=SIZES, attacks=("plain",))
    assert "names none of these facts" in caplog.text


def test_a_plugins_reader_is_known(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from unierase_plugin import ForgetRequest

    readers = {"mine": lambda source: [ForgetRequest(f"Who is {source}?", "Bo")]}
    monkeypatch.setattr(runner, "registry", lambda: SimpleNamespace(readers=readers, attacks=registry().attacks))
    report = audit(folder / "edited", "mine:Al", out=tmp_path / "out", sizes=SIZES, attacks=("plain",))
    assert report["n_audited"] == 1


PLUGIN = """
from unierase_plugin import hookimpl
from unierase_plugin.attack import Attack, AttackResult, Measure
def run(subject, context):
    {what}
    n = len(context.facts)
    return AttackResult((Measure("one", (1.0,) * n, ((0.0,) * n,)),))
@hookimpl
def register_attacks(register):
    register(Attack("mine", "words", "what it asks", "what it costs", run))
"""


def test_what_a_plugins_attack_finds_is_in_the_verdict_and_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Counter[str]
) -> None:
    install = installer(tmp_path / "site", monkeypatch)
    install("mine", PLUGIN.replace("{what}", "pass"))
    report = audited(folder, tmp_path / "out", attacks=("mine",))
    assert "mine (3 of 3" in report["verdict"]
    # In its group's place, and again out of what was kept.
    named = [each["attack"] for each in report["not_run"]]
    assert named.index("fill-in") < named.index("multiple-choice") < named.index("quantise")
    assert audited(folder, tmp_path / "out", attacks=("mine",))["verdict"] == report["verdict"]
    assert runs["edited: mine"] == 1
    # Another version of its code is another attack, whatever its package's version.
    install("mine", PLUGIN.replace("{what}", "note = 1"))
    audited(folder, tmp_path / "out", attacks=("mine",))
    assert runs["edited: mine"] == 2


FAULTS = {
    "changes a weight": ("next(subject.model.parameters()).data.add_(1)", "changed the unedited model"),
    "gives no result": ("return None", "It is to give an AttackResult"),
    "forgets a fact": ("return AttackResult((Measure('one', (1.0,), ((0.0,),)),))", "not one value for each of the 3"),
    "compares with others in one measure alone": (
        "return AttackResult((Measure('one', (1.0,) * 3, ((0.0,) * 3,)), Measure('two', (1.0,) * 3, ())))",
        "another number of rows `others`",
    ),
    "keeps no prompt": (
        "return AttackResult((Measure('one', (1.0,) * 3, (), texts=('a', 'b', 'c')),))",
        "not one prompt and one text for each of the 3 facts",
    ),
    "counts by hundreds": ("return AttackResult((Measure('one', (100.0,) * 3, ()),))", "a value outside [0, 1]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_attack_of_a_plugin_ends_the_audit(
    fault: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, reason = FAULTS[fault]
    installer(tmp_path / "site", monkeypatch)("mine", PLUGIN.replace("{what}", what))
    with pytest.raises(PluginError, match=re.escape(reason)):
        audited(folder, tmp_path / "out", attacks=("mine",))
    assert not (tmp_path / "out" / "audit.json").exists()
    assert not list((tmp_path / "out").rglob("*.mine.json"))


def test_an_attack_that_two_plugins_claim_is_not_left_out_in_silence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = PLUGIN.replace("{what}", "pass").replace('"mine"', '"prefill"')
    installer(tmp_path / "site", monkeypatch)("mine", code)
    for attacks in ((), ("prefill",), ("ban",)):
        with pytest.raises(PluginError, match=r"attack 'prefill' is registered by 'built-in' .* and by 'mine'"):
            audited(folder, tmp_path / "out", attacks=attacks)
    assert audited(folder, tmp_path / "out", attacks=("plain",))["attacks"]


def test_bad_arguments_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="own folder"):
        audited(folder, folder / "edited")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a file"):
        audited(folder, tmp_path / "file")
    with pytest.raises(RequestError, match="every question already gives its answer"):
        audit(folder / "edited", [{"question": "Is it Al or Bo?", "answer": "Al"}], out=tmp_path / "out")


# --- the page --------------------------------------------------------------------------------------------------------


class _Look(HTMLParser):
    """What a page would fetch, and whether its elements close in order."""

    VOID = ("meta", "path", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_the_page_needs_nothing_beside_itself(whole: Path) -> None:
    text = (whole / "audit.html").read_text(encoding="utf-8")
    look = _Look()
    look.feed(text)
    assert look.open == []
    assert look.fetched == []
    assert not {"script", "link", "img", "iframe"} & set(look.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "prefers-color-scheme: dark" in text
    for attack in ATTACKS:
        assert (f"<h3>{attack.name}" in text) == (attack.name not in ("paraphrases", "thinking"))


def test_what_models_say_is_no_markup(whole: Path) -> None:
    report = json.loads((whole / "audit.json").read_text(encoding="utf-8"))
    evil = "<script>alert(1)</script>"
    report["model"] = evil
    for entry in report["attacks"]:
        for example in entry["examples"]:
            example.update(prompt=evil, answer=evil, variant=evil, said={"edited": evil})
    assert "<script" not in page(report)


def test_the_page_of_a_small_audit_says_so(whole: Path) -> None:
    report = json.loads((whole / "audit.json").read_text(encoding="utf-8"))
    report["sizes"]["every_variant"], report["reference"], report["n_echo"] = False, None, 3
    assert "--quick" in page(report)
    assert "No reference model" in page(report)
    assert "<b>3 facts</b>" in page(report)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_list_names_every_attack() -> None:
    done = CliRunner().invoke(app, ["audit", "--list", "--json"])
    assert done.exit_code == 0, done.output
    assert [entry["name"] for entry in json.loads(done.stdout)] == [attack.name for attack in ATTACKS]


def test_the_command_audits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(FORGET), encoding="utf-8")
    monkeypatch.setattr("unierase_plugin.audit.contract.QUICK", replace(SIZES, every_variant=False))
    arguments = ["audit", "--model", folder / "edited", "--forget", tmp_path / "facts.json", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--attacks", "prefill, plain"])
    assert done.exit_code == 0, done.output
    verdict = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))["verdict"]
    assert verdict.startswith(WORDS)
    assert " ".join(verdict.split())[:40] in " ".join(done.output.split())


def test_the_command_says_what_it_needs() -> None:
    done = CliRunner().invoke(app, ["audit", "--model", "x"])
    assert done.exit_code == 1
    assert "--forget, --out" in " ".join(done.output.split())


def test_the_documentation_has_every_attack_and_key(whole: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "explanation" / "audit.md").read_text(encoding="utf-8")
    for attack in ATTACKS:
        assert f"| `{attack.name}` |" in text
    report = json.loads((whole / "audit.json").read_text(encoding="utf-8"))
    for key in report:
        assert f"`{key}" in text, key
    for key in {key for entry in report["attacks"] for key in entry}:
        assert f"`attacks[].{key}" in text, key
