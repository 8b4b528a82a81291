"""A process that has imported everything and forks one child a command, since importing takes longer than a tiny run.

    python tests/faults/zygote.py

reads one JSON line a request from standard input: `{"jobs": [...], "limit": seconds}`, each job with `arguments` of the
command line, `folder` to work in, `environment`, `fault` and `at` (see operations.py), `log` of the file operations and
`output`. The jobs of one request start together. It answers with one JSON line: a status for each, None for one that
was still running at the limit. A request `{"warm": arguments, "folder": folder}` runs a command here, so that a child
has what the first run of a process pays for; on one thread of a CPU that leaves no thread behind.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import audited
import pytest
import small
import torch
from operations import Operations, ended_beside

from unierase_plugin.evaluation.answers import AnswerLength

torch.set_num_threads(1)


def child(job: dict[str, Any], gate: int) -> int:
    """The status of the command, in a process of its own."""
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    from unierase_plugin.cli import app

    # What is random by intent, so that records of two runs can be compared.
    secrets.token_hex = lambda size=32: "5a" * (size or 32)  # type: ignore[assignment]
    sys.argv = ["unierase", *job["arguments"]]
    operations = Operations(Path(job["folder"]), job["fault"], job["at"], Path(job["log"]))
    operations.install()
    os.read(gate, 1)
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class ForkedMethod:
    """Stands in for subprocess.Popen where a comparison runs a method: forked, and its file operations are counted."""

    def __init__(self, words: list[str], *, stderr: Any, env: dict[str, str], **pipes: Any) -> None:
        given, told = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.close(given[1])
                for source, stream in ((given[0], 0), (told[1], 1), (stderr.fileno(), 2)):
                    os.dup2(source, stream)
                sys.stdin = os.fdopen(0)
                os.environ.clear()
                os.environ.update(env)
                importlib.import_module("unierase_plugin.compare.process").main(words[-1])
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(given[0])
        os.close(told[1])
        self.stdin, self.stdout = os.fdopen(given[1], "w"), os.fdopen(told[0])
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> ForkedMethod:
        return self

    def __exit__(self, *reason: Any) -> None:
        self.stdout.close()
        self.stdin.close()
        self.wait()


def start(job: dict[str, Any], gate: tuple[int, int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setpgid(0, 0)
        os.close(gate[1])
        status = child(job, gate[0])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def serve(request: dict[str, Any]) -> list[int | None]:
    gate = os.pipe()
    running = {start(job, gate): place for place, job in enumerate(request["jobs"])}
    found: list[int | None] = [None] * len(running)
    os.close(gate[0])
    # Closing the gate lets all of them go at once.
    os.close(gate[1])
    end = time.monotonic() + request["limit"]
    waiting = set(running)
    while waiting and time.monotonic() < end:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.discard(pid)
                found[running[pid]] = os.waitstatus_to_exitcode(status)
                for job in request["jobs"]:
                    ended_beside(Path(job["log"])).touch()
        time.sleep(0.002)
    for pid in running:
        # And what it has started: a machine that goes down takes all of them.
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        if pid in waiting:
            os.waitpid(pid, 0)
    return found


def warm(request: dict[str, Any]) -> int:
    """How many threads there are after the command."""
    os.chdir(request["folder"])
    with suppress(SystemExit):
        importlib.import_module("unierase_plugin.cli").app(request["warm"])
    return threading.active_count()


def main() -> None:
    patch = pytest.MonkeyPatch()
    small.shrink(patch, Path(os.environ["UNIERASE_CACHE"]))
    patch.setattr("unierase_plugin.pipeline.run.OF_RUNS", AnswerLength(more=0, least=4, most=4))
    patch.setattr("unierase_plugin.audit.contract.QUICK", audited.SIZES)
    patch.setattr("unierase_plugin.compare.results.draw", lambda results, out: {})
    forked = SimpleNamespace(Popen=ForkedMethod, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    patch.setattr("unierase_plugin.compare.launch.subprocess", forked)
    # The requests come in and go out on descriptors that no child has.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    answers.write('"ready"\n')
    answers.flush()
    for line in requests:
        request = json.loads(line)
        answers.write(json.dumps(warm(request) if "warm" in request else serve(request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
