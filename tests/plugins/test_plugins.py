"""Plugins: what is built in and what is installed, through the same hooks; and any method through the same frame."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh import ROOT, Environment
from installed import Install, installer
from small import FORGET, HPARAMS, RETAIN, save_base, shrink
from tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from unierase_plugin import ForgetRequest, UniEraseHyperParams, cli, pipeline, unlearn
from unierase_plugin.attack import Attack
from unierase_plugin.checkpoint import read_checkpoint
from unierase_plugin.errors import CheckpointError, EditError, HyperParamsError, PluginError, UniEraseError
from unierase_plugin.facts.benchmarks import READERS
from unierase_plugin.facts.readers import read_requests
from unierase_plugin.hparams import HyperParams
from unierase_plugin.methods.contract import Changes, Job, Method
from unierase_plugin.plugins import hookspecs
from unierase_plugin.plugins import registration as module
from unierase_plugin.plugins.catalogue import BUILT_IN, Catalogue
from unierase_plugin.plugins.foreign import guarded
from unierase_plugin.plugins.registration import load_registry

PAGE = (ROOT / "docs/reference/plugins.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs/tutorial/3-method.md").read_text(encoding="utf-8")
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("register_"))
HEAD = """
from unierase_plugin.attack import Attack, AttackResult
from unierase_plugin import ForgetRequest, hookimpl
from unierase_plugin.locate_then_edit.solve import Ridge
from unierase_plugin.facts.records import Benchmark
from unierase_plugin.hparams import HyperParams
from unierase_plugin.plugins.hookspecs import Host
from unierase_plugin.methods.contract import Changes, Method
def method(name):
    return Method(name, "a title", "a paper", HyperParams, lambda job: Changes())
def attack(name, group="words"):
    return Attack(name, group, "what it asks", "what it costs", lambda subject, context: AttackResult())
"""
GOOD = """
@hookimpl
def register_methods(register):
    register(method("{name}"))
@hookimpl
def register_request_readers(register):
    register("{name}_facts", lambda text: [ForgetRequest(text, "an answer")])
@hookimpl
def register_metrics(register):
    register("{name}_length", len)
@hookimpl
def register_hosts(register):
    register(Host("{name}_host", "a title", "json", print))
@hookimpl
def register_attacks(register):
    register(attack("{name}-attack"))
@hookimpl
def register_solvers(register):
    register("{name}_solver", lambda system: Ridge.of(system.moment()))
@hookimpl
def register_benchmarks(register):
    register(Benchmark("{name}_bench", "a title", "a paper", lambda text: [ForgetRequest(text, "an answer")]))
@hookimpl
def register_commands(register):
    register("{name}-command", lambda: print("said"))
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`installed.installer`, with what every plugin here imports."""
    install = installer(tmp_path / "site", monkeypatch)

    def call(name: str, body: str = GOOD, **package: str) -> None:
        install(name, (HEAD + textwrap.dedent(body)).replace("{name}", name), **package)

    return call


def third_party(registry: module.Registry) -> list[str]:
    return [plugin.name for plugin in registry.plugins if not plugin.error and plugin.name != BUILT_IN]


def catalogues(registry: module.Registry) -> list[Catalogue[Any]]:
    return [value for value in vars(registry).values() if isinstance(value, Catalogue)]


# --- what is found ---------------------------------------------------------------------------------------------------


def test_what_comes_with_the_package_is_registered_through_every_hook(install: Install) -> None:
    found = load_registry("")
    (built_in,) = found.plugins
    # The command line stands above what is registered; the readers are those of benchmarks.
    through = [hook for hook in HOOKS if hook not in ("register_commands", "register_request_readers")]
    assert (built_in.name, built_in.package, sorted(built_in.hooks)) == (BUILT_IN, "unierase-plugin", through)
    assert found.methods["unierase"].hparams is UniEraseHyperParams
    assert dict(found.readers) == dict(READERS)
    assert found.metrics["answered"]("Paris", "It is Paris.")
    assert found.hosts["lm_eval"].module == "lm_eval.tasks"


def test_an_installed_plugin_adds_through_every_hook(install: Install) -> None:
    install("extra")
    found = load_registry()
    plugin = found.plugins[-1]
    assert (plugin.name, plugin.version, plugin.package) == ("extra", "1.2", "extra-package")
    assert (plugin.module, plugin.error, sorted(plugin.hooks)) == ("extra_package_code", "", HOOKS)
    assert found.methods.find("extra").title == "a title"
    assert read_requests("extra_facts:a question[0:1]", found.readers)[0].question == "a question"
    assert found.metrics["extra_length"]("four") == 4
    assert found.hosts.owner("extra_host") == plugin
    assert found.attacks["extra-attack"].asks == "what it asks"
    assert found.solvers.owner("extra_solver") == plugin
    assert found.commands.owner("extra-command") == plugin
    assert found.benchmarks.owner("extra_bench") == plugin
    assert read_requests("extra_bench:a question", found.readers)[0].question == "a question"
    assert {"unierase", "extra"} <= set(found.methods)


def test_a_plugin_may_be_an_object_and_take_what_it_needs(install: Install) -> None:
    install("extra", "@hookimpl\ndef register_metrics(register):\n    register('half', lambda x: x / 2)")
    found = load_registry()
    assert found.plugins[-1].hooks == ("register_metrics",)
    assert found.metrics["half"](3) == 1.5


def test_every_hook_is_documented_on_the_page_and_in_its_place() -> None:
    assert sorted(module.HOOKS) == HOOKS
    assert all(f"| `{hook}` |" in PAGE for hook in HOOKS)
    assert all(getattr(hookspecs, hook).__doc__ for hook in HOOKS)


def test_the_page_names_every_field_of_the_contract() -> None:
    wanted = {*Method.__dataclass_fields__} - {"name", "title", "paper", "hparams", "run"} | {*Changes().__dict__}
    assert {name for name in wanted if f"`{name}`" not in PAGE} == set()


def test_pluggy_is_imported_when_a_plugin_asks_for_its_marker() -> None:
    code = (
        "import sys, unierase_plugin as u\nprint('pluggy' in sys.modules)\nu.hookimpl\nprint('pluggy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


# --- what goes wrong -------------------------------------------------------------------------------------------------

BROKEN = {
    "fails when imported": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "ends the program": ("raise SystemError('no')", "SystemError: no"),
    "exits when imported": (
        "import sys\nprint('noise')\nsys.exit(3)",
        "tried to end the program (SystemExit: 3)",
    ),
    "exits in silence": ("raise SystemExit", "tried to end the program (SystemExit: )"),
    "interrupts when imported": ("raise KeyboardInterrupt", "tried to end the program (KeyboardInterrupt: )"),
    "is cancelled when imported": ("import asyncio\nraise asyncio.CancelledError", "the program (CancelledError: )"),
    "exits in a hook": (GOOD.replace('register("{name}_length", len)', "exit()"), "the program (SystemExit: None)"),
    "has no hook": ("x = 1", "has none of the hooks register_methods"),
    "has an unknown hook": (
        "@hookimpl\ndef register_method(register): pass",
        "unknown hook register_method. Did you mean 'register_methods'?",
    ),
    "takes something else": ("@hookimpl\ndef register_methods(methods): pass", "Argument(s) {'methods'}"),
    "fails half-way": (GOOD.replace('register("{name}_length", len)', "1 / 0"), "ZeroDivisionError"),
    "registers no method": (GOOD.replace('register(method("{name}"))', "register(print)"), "register takes a Method"),
    "registers no host": ("@hookimpl\ndef register_hosts(register): register('a')", "register takes a Host, not 'a'"),
    "has a benchmark that no spec can name": (
        '@hookimpl\ndef register_benchmarks(register): register(Benchmark("a b", "", "", print))',
        "A benchmark cannot be called 'a b'",
    ),
    "has a benchmark without its tasks": (
        '@hookimpl\ndef register_benchmarks(register): register(Benchmark("ab", "", "", print, "/nowhere"))',
        "The tasks of the benchmark 'ab' are not there: no folder '/nowhere'",
    ),
    "has a benchmark and a reader of one name": (
        GOOD.replace('"{name}_bench"', '"{name}_facts"'),
        "register_request_readers: 'broken_facts' is registered twice",
    ),
    "registers no attack": (
        "@hookimpl\ndef register_attacks(register): register(1)",
        "register takes an Attack, not 1",
    ),
    "has an attack in no group": (
        '@hookimpl\ndef register_attacks(register): register(attack("a", "word"))',
        "in the group 'word', which does not exist. Did you mean 'words'?",
    ),
    "has an attack that no file can be named after": (
        '@hookimpl\ndef register_attacks(register): register(attack("a/b"))',
        "An attack cannot be called 'a/b'",
    ),
    "registers no function": ("@hookimpl\ndef register_metrics(register): register('a', 1)", "a name and a function"),
    "registers twice": (GOOD.replace('method("{name}"))', 'method("{name}")); register(method("{name}"))'), "twice"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_named_and_the_rest_works(
    what: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    body, reason = BROKEN[what]
    install("aleph")
    install("broken", body)
    install("zeta")
    with caplog.at_level(logging.WARNING):
        found = load_registry()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The plugin 'broken' (broken-package 1.2) cannot be used and is left out" in said
    assert reason in said
    (error,) = [plugin.error for plugin in found.plugins if plugin.error]
    assert reason in error
    assert third_party(found) == ["aleph", "zeta"]
    for catalogue in catalogues(found):
        assert not [name for name in catalogue if name.startswith("broken")]
        # A benchmark is a reader too.
        each = 2 if catalogue is found.readers else 1
        assert len([name for name in catalogue if name.startswith(("aleph", "zeta"))]) == 2 * each


ENDS = """
import sys
import torch
def end(*arguments):
    {how}
@hookimpl
def register_methods(register):
    register(Method("{name}", "a title", "a paper", HyperParams, end, check=end, settle=end))
@hookimpl
def register_request_readers(register):
    register("{name}_facts", end)
@hookimpl
def register_metrics(register):
    register("{name}_length", end)
@hookimpl
def register_hosts(register):
    register(Host("{name}_host", "a title", "json", end))
@hookimpl
def register_attacks(register):
    register(Attack("{name}-attack", "words", "what it asks", "what it costs", end, unfit=end))
class Rude(Ridge):
    protecting = lambda self, keys: self
    solve = condition = error = end
@hookimpl
def register_solvers(register):
    register("{name}_solver", end)
    register("{name}_solving", lambda system: Rude(torch.eye(2, dtype=torch.float64)))
@hookimpl
def register_benchmarks(register):
    register(Benchmark("{name}_bench", "a title", "a paper", end))
"""
CALLS: dict[str, Callable[[module.Registry], Any]] = {
    "method": lambda found: found.methods.find("rude").run(None),  # type: ignore[arg-type]
    "method's check": lambda found: found.methods.find("rude").check(None),  # type: ignore[arg-type]
    "method's settings": lambda found: found.methods.find("rude").settle(None, None),
    "reader": lambda found: read_requests("rude_facts:x", found.readers),
    "benchmark": lambda found: found.benchmarks["rude_bench"].read("x"),
    "benchmark's reader": lambda found: read_requests("rude_bench:x", found.readers),
    "metric": lambda found: found.metrics["rude_length"]("x"),
    "host": lambda found: found.hosts["rude_host"].register(),
    "attack": lambda found: found.attacks["rude-attack"].run(None, None),  # type: ignore[arg-type]
    "solver": lambda found: found.solvers["rude_solver"](None),  # type: ignore[arg-type]
    "solving": lambda found: found.solvers["rude_solving"](None).protecting(None).solve(None, None),  # type: ignore[arg-type]
    "attack's fitness": lambda found: found.attacks["rude-attack"].unfit(None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("how", ["sys.exit(0)", "raise KeyboardInterrupt", "exit()"])
@pytest.mark.parametrize("part", CALLS)
def test_nothing_of_a_plugin_ends_the_program(part: str, how: str, install: Install) -> None:
    install("rude", ENDS.replace("{how}", how))
    with pytest.raises(PluginError, match=r"of the plugin 'rude' \(rude-package 1.2\) tried to end the program"):
        CALLS[part](load_registry())


@pytest.mark.parametrize("part", CALLS)
def test_ctrl_c_ends_a_plugin_as_it_ends_all_else(part: str, install: Install) -> None:
    before = signal.getsignal(signal.SIGINT)
    install("rude", ENDS.replace("{how}", "import signal\n    signal.raise_signal(signal.SIGINT)"))
    with pytest.raises(KeyboardInterrupt):
        CALLS[part](load_registry())
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_plugins_are_found_is_no_fault_of_theirs(install: Install) -> None:
    install(
        "slow", "import signal\nsignal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))\nsignal.raise_signal(2)"
    )
    with pytest.raises(KeyboardInterrupt):
        load_registry()


@pytest.mark.parametrize(
    "body", ["print('noise')\n" + GOOD, GOOD.replace("register(method", "print('noise'); register(method")]
)
@pytest.mark.parametrize("command", ["plugins", "methods", "hosts"])
def test_what_a_plugin_prints_is_not_in_what_a_command_prints(command: str, body: str, install: Install) -> None:
    install("loud", body)
    done = CliRunner().invoke(cli.app, [command, "--json"])
    assert any("loud" in str(each) for each in json.loads(done.stdout))
    assert "noise" in done.stderr


def test_a_name_that_two_plugins_claim_belongs_to_neither(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("noise", GOOD, package="one")
    install("other", GOOD.replace("{name}", "noise"), package="two", version="3")
    with caplog.at_level(logging.WARNING):
        found = load_registry()
    both = r"'noise' \(one 1.2\) and by 'other' \(two 3\).*UNIERASE_PLUGINS"
    assert len([record for record in caplog.records if re.search(both, record.getMessage())]) == len(HOOKS) + 1
    assert "noise" not in list(found.methods)
    with pytest.raises(PluginError, match=f"The method 'noise' is registered by {both}"):
        found.methods.find("noise")
    with pytest.raises(PluginError, match=f"The request reader 'noise_facts' is registered by {both}"):
        read_requests("noise_facts:x", found.readers)
    assert found.methods.find("unierase")
    assert load_registry("one").methods.find("noise")


def test_a_built_in_name_is_not_taken_over_in_silence(install: Install) -> None:
    install("taker", GOOD.replace("{name}", "unierase"))
    with pytest.raises(PluginError, match=r"'built-in' \(unierase-plugin .*and by 'taker' \(taker-package 1.2\)"):
        load_registry().methods.find("unierase")


def test_an_unknown_name_gets_the_nearest_one(install: Install) -> None:
    with pytest.raises(PluginError, match=r"no method 'unirase'. Did you mean 'unierase'\? Available: .*unierase"):
        load_registry().methods.find("unirase")
    with pytest.raises(KeyError):
        load_registry().methods["unirase"]


def test_an_unknown_name_may_be_that_of_a_plugin_that_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=r"unierase\.$"):
        module.registry().methods.find("mine")
    monkeypatch.setenv("UNIERASE_PLUGINS", "")
    with pytest.raises(PluginError, match=r"unierase\. UNIERASE_PLUGINS= leaves out the other plugins\.$"):
        module.registry().methods.find("mine")


# --- restricting what is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loaded"),
    [
        (None, ["first", "second"]),
        ("", []),
        (" , ", []),
        ("second", ["second"]),
        ("first-package", ["first"]),
        ("second, first", ["first", "second"]),
        (BUILT_IN, []),
    ],
)
def test_the_environment_restricts_what_is_loaded(
    value: str | None, loaded: list[str], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("first")
    install("second")
    if value is not None:
        monkeypatch.setenv("UNIERASE_PLUGINS", value)
    assert third_party(module.registry()) == loaded
    assert "unierase" in module.registry().methods
    for name in ("first", "second"):
        assert (f"{name}_package_code" in sys.modules) == (name in loaded)


def test_a_restriction_to_what_is_not_there_is_told(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("first")
    with caplog.at_level(logging.WARNING):
        load_registry("frist")
    assert "UNIERASE_PLUGINS names 'frist', which is not installed. Did you mean 'first'? Installed: first" in (
        caplog.text.replace("\n", " ")
    )


# --- commands --------------------------------------------------------------------------------------------------------


def listed(*arguments: str) -> Any:
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_commands_list_what_is_there(install: Install) -> None:
    install("extra")
    install("broken", "import no_such_module")
    plugins = {each["name"]: each for each in listed("plugins")}
    assert plugins["extra"]["version"] == "1.2"
    assert sorted(plugins["extra"]["hooks"]) == HOOKS
    assert (plugins["extra"]["package"], plugins["extra"]["module"]) == ("extra-package", "extra_package_code")
    error = plugins["broken"]["error"]
    assert "no_such_module" in error
    assert plugins["extra"]["registers"]["method"] == ["extra"]
    assert plugins["extra"]["registers"]["benchmark"] == ["extra_bench"]
    assert plugins["broken"]["registers"] == {}
    assert "ridge" in plugins[BUILT_IN]["registers"]["solver"]
    table = CliRunner().invoke(cli.app, ["plugins"]).stdout
    assert "extra: request reader extra_facts, extra_bench\n" in table
    assert f"broken cannot be used: {error}\n" in table  # whole, however narrow the terminal is
    assert "built-in: " not in table
    methods = {each["name"]: each for each in listed("methods")}
    assert methods["unierase"]["hparams"]["v_lr"] == UniEraseHyperParams().v_lr
    assert methods["unierase"]["paper"].startswith("Yu et al. 2025")
    assert methods["extra"]["plugin"] == "extra"
    hosts = {each["name"]: each for each in listed("hosts")}
    assert hosts["extra_host"]["installed"]  # its module is json
    assert not hosts["extra_host"]["registers_itself"]


@pytest.mark.parametrize(("command", "shown"), [("plugins", "built-in"), ("methods", "unierase"), ("hosts", "lm_eval")])
def test_the_commands_print_tables(command: str, shown: str, install: Install) -> None:
    assert shown in CliRunner().invoke(cli.app, [command]).stdout


# --- any method through the same frame -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise(HyperParams):
    """Settings of a method for these tests."""

    size: float = 0.5


def add_noise(job: Job[Noise]) -> Changes:
    """Noise on one projection, with everything that a method may say of it."""
    weight = job.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    before = weight.detach().clone()
    generator = torch.Generator().manual_seed(job.seed)
    with torch.no_grad():
        weight += job.hparams.size * torch.randn(weight.shape, generator=generator)
    job.progress("noise", 1.0, "")
    return Changes(
        parameters=weight.numel(),
        seconds={"noise": 1.5},
        figures={"size": job.hparams.size},
        undo=lambda: weight.data.copy_(before),
    )


NOISE = Method("noise", "noise", "nobody", Noise, add_noise)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shrink(monkeypatch, tmp_path / "cache")
    return save_base(tmp_path / "base")


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def differing(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_a_method_gets_the_job_and_the_folder_gets_the_record(base: Path, tmp_path: Path) -> None:
    jobs: list[Job[Noise]] = []

    def watched(job: Job[Noise]) -> Changes:
        jobs.append(job)
        assert not job.model.training
        assert not any(weight.requires_grad for weight in job.model.parameters())
        return add_noise(job)

    phases: list[str] = []
    method = replace(NOISE, run=watched, check=lambda job: phases.append("check"))
    result = unlearn(
        base,
        FORGET,
        method=method,
        retain=RETAIN,
        hparams=Noise(size=0.25),
        out=tmp_path / "out",
        seed=3,
        max_batch_tokens=77,
        progress=lambda phase, share, note: phases.append(phase),
    )
    (job,) = jobs
    assert job.hparams == Noise(size=0.25, seed=3, max_batch_tokens=77)
    assert (job.seed, job.max_tokens, job.name, job.history) == (3, 77, str(base), None)
    assert [fact.question for fact in job.requests] == [fact["question"] for fact in FORGET]
    assert [fact.answer for fact in job.retain] == ["Hats"]
    assert list(dict.fromkeys(phases)) == ["load", "check", "before", "noise", "after", "save"]
    record = read_checkpoint(tmp_path / "out")
    assert (record.manifest["method"], record.manifest["seed"], record.manifest["hparams"]["size"]) == (
        "noise",
        3,
        0.25,
    )
    assert (record.token, record.edits, record.originals) == (None, (), None)
    report = record.report
    assert (report["method"], report["n_forget"], report["n_retain"]) == ("noise", 2, 1)
    assert report["seconds"].keys() == {"noise", "evaluate"}
    assert report["edit"] == {"size": 0.25}
    total = sum(weight.numel() for weight in result.model.parameters())
    assert report["parameters_changed"] == pytest.approx(32 * 64 / total)
    assert report["perplexity"]["before"] != report["perplexity"]["after"]
    assert (result.token, result.edit) == (None, None)


def test_a_method_with_nothing_to_say_is_recorded_all_the_same(base: Path, tmp_path: Path) -> None:
    unlearn(base, FORGET, method=replace(NOISE, run=lambda job: None), out=tmp_path / "out")
    report = read_checkpoint(tmp_path / "out").report
    assert (report["parameters_changed"], report["edit"], report["update_norm_ratio"]) == (1.0, {}, {})
    assert report["seconds"].keys() == {"noise", "evaluate"}


def test_subjects_are_asked_for_where_the_method_needs_them(base: Path) -> None:
    unnamed = [ForgetRequest("why?", "because")]
    assert unlearn(base, unnamed, method=NOISE).requests[0].subject is None
    with pytest.raises(UniEraseError, match="No subject found"):
        unlearn(base, unnamed, method=replace(NOISE, needs_subjects=True))


def test_settings_come_from_a_file_and_may_follow_the_model(base: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.yaml").write_text("size: 1e-1\n")
    method = replace(NOISE, settle=lambda model, hparams: hparams.replace(size=2 * hparams.size))
    assert unlearn(base, FORGET, method=method, hparams=tmp_path / "noise.yaml").hparams == Noise(size=0.2)
    assert unlearn(base, FORGET, method=method).hparams == Noise(size=1.0)
    (tmp_path / "noise.yaml").write_text("sise: 1\n")
    with pytest.raises(HyperParamsError, match=r"Unknown hyper-parameter 'sise'. Did you mean 'size'\?"):
        unlearn(base, FORGET, method=method, hparams=tmp_path / "noise.yaml")
    with pytest.raises(HyperParamsError, match=r"No hyper-parameter file 'llama3.1-8b'. Give a YAML file\.$"):
        unlearn(base, FORGET, method=method, hparams="llama3.1-8b")
    with pytest.raises(HyperParamsError, match="takes Noise, not UniEraseHyperParams"):
        unlearn(base, FORGET, method=method, hparams=UniEraseHyperParams())
    with pytest.raises(HyperParamsError, match=r"'noise' reads no corpus. Leave corpus \(--corpus\) out"):
        unlearn(base, FORGET, method=method, corpus="self")


def test_what_is_refused_early_costs_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Any) -> None:
        raise HyperParamsError("needs facts to keep")

    monkeypatch.setattr(pipeline.run, "answers", lambda *args, **kwargs: pytest.fail("the model was asked"))
    with pytest.raises(HyperParamsError, match="needs facts to keep"):
        unlearn(base, FORGET, method=replace(NOISE, check=refuse), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_in_a_plugin_names_the_plugin_and_the_line() -> None:
    def broken() -> None:
        raise KeyError("nothing")

    with pytest.raises(PluginError, match=r"The reader 'x' failed: KeyError: 'nothing' \(.*test_plugins\.py, line \d"):
        guarded(broken, "The reader 'x'")()


def test_a_method_that_gives_something_else_is_named(base: Path) -> None:
    with pytest.raises(PluginError, match=r"The method 'noise' gave 'hello'\. It must give a `Changes`"):
        unlearn(base, FORGET, method=replace(NOISE, run=lambda job: "hello"))  # type: ignore[arg-type, return-value]


def test_a_damaged_model_that_cannot_be_reverted_is_not_to_be_used(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(job: Any) -> None:
        job.model.get_input_embeddings().weight.data.fill_(torch.nan)

    unlearn(base, FORGET, method=replace(NOISE, run=damage))
    assert "Do not use it: start again from the unedited model." in caplog.text


def test_an_attack_has_no_name_of_a_group() -> None:
    with pytest.raises(PluginError, match="'words': a group has that name"):
        Attack("words", "inside", "asks", "cheap", lambda subject, context: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("fails", ["judge", "save"])
def test_a_failure_after_the_method_undoes_what_it_did(
    fails: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise UniEraseError("no room")

    model = tiny_model()
    before = state(model)
    monkeypatch.setattr(*(pipeline.run, "judge") if fails == "judge" else (pipeline.run.files, "save_checkpoint"), fail)  # type: ignore[attr-defined]
    with pytest.raises(UniEraseError, match="no room"):
        unlearn(model, FORGET, method=NOISE, tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    assert not differing(model, before)


def test_revert_undoes_or_says_that_it_cannot(base: Path) -> None:
    model = tiny_model()
    before = state(model)
    result = unlearn(model, FORGET, method=NOISE, tokenizer=tiny_tokenizer())
    assert differing(model, before) == {"model.layers.1.mlp.down_proj.weight"}
    result.revert()
    assert not differing(model, before)
    with pytest.raises(EditError, match="The changes of 'noise' cannot be taken back in memory"):
        replace(result, changes=Changes()).revert()


def test_modes_and_gradients_that_a_method_sets_are_put_back(base: Path) -> None:
    def train(job: Any) -> None:
        job.model.train().requires_grad_(True)

    model = tiny_model().eval()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    unlearn(model, FORGET, method=replace(NOISE, run=train), tokenizer=tiny_tokenizer())
    assert not model.training
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["model.norm.weight"]


def test_a_method_goes_on_from_its_own_folders_alone(base: Path, tmp_path: Path) -> None:
    first: list[str | None] = []

    def count(job: Job[Noise]) -> Changes:
        first.append(job.history.fingerprint if job.history else None)
        return add_noise(job)

    method = replace(NOISE, run=count)
    unlearn(base, FORGET, method=method, out=tmp_path / "one")
    unlearn(tmp_path / "one", FORGET, method=method, out=tmp_path / "two")
    assert first == [None, read_checkpoint(tmp_path / "one").manifest["model_fingerprint_before"]]
    assert len(read_checkpoint(tmp_path / "two").manifest["steps"]) == 2
    with pytest.raises(CheckpointError, match=r"made by another method\. Start from its base model"):
        unlearn(tmp_path / "one", FORGET, method=replace(NOISE, name="hiss"))


SOLVING = """
from unierase_plugin.locate_then_edit.solvers import ridge
@hookimpl
def register_solvers(register):
    register("mine", ridge)
"""


def test_a_run_with_a_plugin_s_solver_is_another_once_the_plugin_s_code_changed(
    base: Path, tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a stopped run kept was solved by the code from before."""
    shrink(monkeypatch, tmp_path / "cache")
    work, places = pipeline.run.files.work_folder, []  # type: ignore[attr-defined]

    def stopped(folder: Path, key: str) -> Any:
        places.append(work(folder, key).root)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.run.files, "work_folder", stopped)  # type: ignore[attr-defined]
    for code in (SOLVING, SOLVING, SOLVING + "# another version"):
        install("mine", code)
        with pytest.raises(KeyboardInterrupt):
            unlearn(base, FORGET, hparams=HPARAMS.replace(solver="mine"), out=tmp_path / "out")
    assert places[0] == places[1] != places[2]


def test_a_stopped_run_finds_what_its_method_kept(base: Path, tmp_path: Path) -> None:
    def keep(job: Job[Noise]) -> Changes:
        assert job.work is not None
        kept = job.work / "mine.txt"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("expensive")
            raise KeyboardInterrupt
        return Changes(figures={"kept": kept.read_text() == "expensive"})

    method = replace(NOISE, run=keep)
    with pytest.raises(KeyboardInterrupt):
        unlearn(base, FORGET, method=method, out=tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):  # other settings, another job
        unlearn(base, FORGET, method=method, hparams=Noise(size=9), out=tmp_path / "out")
    assert unlearn(base, FORGET, method=method, out=tmp_path / "out").report.edit == {"kept": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_uni_erase_through_its_method_is_uni_erase(base: Path) -> None:
    from small import HPARAMS

    method = load_registry("").methods["unierase"]
    named, given = (unlearn(base, FORGET, hparams=HPARAMS, method=each) for each in ("unierase", method))
    assert named.edit is not None
    assert given.edit is not None
    for layer in HPARAMS.layers:
        assert torch.equal(named.edit.updates[layer].up, given.edit.updates[layer].up)


@pytest.mark.parametrize("name", ["", "Upper", "with-dash", "1st", "naïve"])
def test_a_method_has_a_name_that_can_be_typed(name: str) -> None:
    with pytest.raises(PluginError, match="lower-case letters, digits and underscores"):
        replace(NOISE, name=name)


def test_a_method_has_settings_that_can_be_read() -> None:
    with pytest.raises(PluginError, match=r"must be a class that derives from unierase_plugin.hparams.HyperParams"):
        replace(NOISE, hparams=dict)  # type: ignore[arg-type]


# --- the package of the page -----------------------------------------------------------------------------------------


def test_the_package_of_the_tutorial_is_installed_and_its_method_runs(tmp_path: Path) -> None:
    files = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", TUTORIAL, flags=re.DOTALL))
    assert files.keys() == {"pyproject.toml", "forget_by_ascent.py"}
    package = tmp_path / "forget-by-ascent"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text, encoding="utf-8")
    environment = Environment(tmp_path / "env")
    environment.pip("install", package)
    ours = {"PYTHONPATH": str(ROOT), "UNIERASE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    found = json.loads(environment.run("-m", "unierase_plugin", "plugins", "--json", **ours).stdout)
    assert [(each["name"], each["version"], each["error"]) for each in found[1:]] == [("ascent", "0.1", "")]

    model = save_base(tmp_path / "base")
    (tmp_path / "facts.txt").write_text("Who wrote Zorblax Prime? | Quentin Fizz\nWhere is Wexbury? | In Plonkshire\n")
    (tmp_path / "ascent.yaml").write_text("steps: 2\nlr: 5e-3\n")
    done = environment.run(
        "-m",
        "unierase_plugin",
        "run",
        "--model",
        model,
        "--forget",
        f"quiz:{tmp_path / 'facts.txt'}[0:1]",
        "--method",
        "ascent",
        "--hparams",
        tmp_path / "ascent.yaml",
        "--out",
        tmp_path / "out",
        **ours,
    )
    assert done.returncode == 0, done.stderr
    record = read_checkpoint(tmp_path / "out")
    assert (record.manifest["method"], record.manifest["hparams"]["lr"]) == ("ascent", 5e-3)
    assert (record.report["n_forget"], record.report["edit"]) == (1, {"steps": 2})
    assert _loss(tmp_path / "out") > _loss(model)


def _loss(folder: Path) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("Who wrote Zorblax Prime? Quentin Fizz", return_tensors="pt").input_ids
    with torch.no_grad():
        return float(AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids, labels=ids).loss)
