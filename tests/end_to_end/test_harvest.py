"""Other dtypes and scheduler options, interruption, and faults, on real SGLang."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from sglang_probe.paths import shipped
from sglang_probe.run.hook_points import ATTENTION
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import load_run
from sglang_probe.verify.reference import reference_errors
from sglang_probe.verify.verify import verify
from tests.warm.commands import Started, shared

pytestmark = pytest.mark.engine
MODEL = shipped("models/probe-text/checkpoint")


def test_fp32_rows_agree_with_transformers(cli: Callable, tmp_path: Path) -> None:
    """Of a file as people have it, whose usable records are served token by token."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    words = (json.__doc__ or "").split()
    chats = [[{"role": "user", "content": " ".join(words[20 * i : 20 * i + 80])}] for i in range(7)]
    rendered = tokenizer.apply_chat_template(chats[0], tokenize=False, add_generation_prompt=True)
    ids = [7, *tokenizer.encode(rendered)[:20], 7, 7]
    records = [
        *({"messages": chat, "id": i} for i, chat in enumerate(chats)),
        {"prompt": rendered},
        {"prompt_ids": ids, "segments": [[0, 1, "special"], [1, 9, "document"]]},
        {"input_ids": ids[:9]},
        {"prompt": "x " * 9000},
        {"prompt": "x", "sampling_params": {"top_p": 2}},
    ]
    with gzip.open(tmp_path / "mine.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in records))
    config = tmp_path / "mine.yaml"
    points = "[hook_embed, blocks.*.hook_resid_post, " + ", ".join(f"'blocks.{{0..3}}.{s}'" for s in ATTENTION) + "]"
    config.write_text(
        "workload: {source: jsonl, path: mine.jsonl.gz, skip_bad: true}\ndtype: float32\narm: {cache: off}\n"
        f"sampling: {{max_new_tokens: 8, temperature: 1e-9}}\nhook_points: {points}\n"
    )
    done = cli("harvest", config, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    told = "2 records were skipped: 1 too long, 1 sampling value"
    assert told in done.stdout
    run = load_run(tmp_path / "run")
    assert "1 too long, 1 sampling value" in (run.path / "README.md").read_text()
    assert run.manifest["skipped_by_reason"] == {"too long": 1, "sampling value": 1}
    assert run.manifest["prompts_made_from"]["add_special_tokens"] == "auto"
    assert run.hook_points == [
        "hook_embed",
        *(f"blocks.{i}.hook_resid_post" for i in range(4)),
        *(f"blocks.{i}.{site}" for site in ATTENTION for i in range(4)),
    ]
    served = [list(p) for p in run.requests()["prompt_ids"]]
    how = {"add_generation_prompt": True, "return_dict": False}
    assert served[:7] == [tokenizer.apply_chat_template(chat, **how) for chat in chats]
    assert served[7:] == [served[0], ids, ids[:9]]
    assert [s["name"] for s in run.requests()["segments"][8]] == ["special", "document", "prompt"]
    assert [str(c) for c in verify(run) if not c.holds] == []
    errors = reference_errors(run, str(MODEL), requests=10)
    assert max(float(e.max()) for e in errors.values()) < 1e-4


@pytest.mark.slow
def test_the_ledger_holds_without_overlap_in_pages(cli: Callable, write_yaml: Callable, tmp_path: Path) -> None:
    server = {"disable_overlap_schedule": True, "page_size": 16, "chunked_prefill_size": 128}
    config = write_yaml("options", server=server, sampling={"max_new_tokens": 24, "temperature": 1.0})
    done = cli("harvest", config, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(tmp_path / "run")
    assert [str(c) for c in verify(run) if not c.holds] == []
    assert (run.spans()["phase"] != "overshoot").all()


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Start a command in a session of its own; whatever is left of it is ended after the test."""
    started = []

    def start(config: Path, path: Path, *options: str, command: str = "harvest") -> Started:
        process = shared().start("sglang_probe", [command, str(config), "--output", str(path), *options], os.environ)
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in _alive(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)


def test_an_interrupted_harvest_says_so_and_can_be_finished(
    write_yaml: Callable, tmp_path: Path, cli: Callable, start: Callable
) -> None:
    """SIGTERM to all, resume, kill -9 of the scheduler, resume: nothing durable is lost, every request is served once,
    and whoever is left says why. Kill -9 of all: the interrupted experiment below."""
    path = tmp_path / "run"
    config = write_yaml(
        "long",
        workload={"requests_per_family": 40, "exemplars": 1},
        sampling={"max_new_tokens": 100, "temperature": 0.0, "ignore_eos": True},
        checkpoint_seconds=0.5,
    )
    first = start(config, path)
    _wait_for_requests(first, path, 5)
    os.killpg(first.pid, signal.SIGSTOP)  # or it may be done before the others have come so far
    for option in ("--resume", "--overwrite"):
        second_writer = cli("harvest", config, "--output", path, option)
        assert second_writer.returncode == 2
        assert f"process {first.pid} on " in second_writer.stderr
    os.killpg(first.pid, signal.SIGCONT)
    os.killpg(first.pid, signal.SIGTERM)
    assert first.wait(300) == 128 + signal.SIGTERM
    assert not _alive(first.pid)
    interrupted = load_run(path)
    assert not interrupted.complete
    assert interrupted.manifest["fault"] == "ended by SIGTERM"
    served = set(interrupted.engine_requests()["rid"])
    assert 5 <= len(served) < 80
    assert all(c.holds for c in verify(interrupted))
    refused = cli("harvest", config, "--output", path)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr

    second = start(config, path, "--resume")
    _wait_for_requests(second, path, len(served) + 5)
    _scheduler_of(second).kill()
    assert second.wait(300) == 2
    assert not _alive(second.pid)
    died = load_run(path)
    assert "was killed by SIGKILL; requests in flight: r0" in died.manifest["fault"]
    in_flight = set(died.manifest["ended_engine"])
    assert len(in_flight) == 3  # the concurrency
    suspects = in_flight - set(died.engine_requests()["rid"].str.partition("~")[0])  # read now: later starts add to it
    assert all(c.holds for c in verify(died))

    done = cli("harvest", config, "--output", path, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(path)
    assert run.complete
    assert all(c.holds for c in verify(run)), [c.violation for c in verify(run)]
    requests = run.requests()
    finished = requests[requests["finish_reason"] != "interrupted"]
    assert sorted(finished["index"]) == list(range(80))
    assert served <= set(finished["rid"])
    last = finished.sort_values("rid", key=lambda rids: rids.map(run.spans().groupby("rid")["forward_id"].min()))
    assert {rid.partition("~")[0] for rid in last["rid"].iloc[len(last) - len(suspects) :]} == suspects
    assert len(run.manifest["starts"]) == 3
    assert {p.session for p in run.parts()} == {0, 1, 2}
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow
def test_an_interrupted_experiment_is_finished_by_resume(
    write_yaml: Callable, tmp_path: Path, cli: Callable, start: Callable
) -> None:
    """The first arm is killed on the way; its interrupted requests must not count twice, nor block the comparison."""
    path = tmp_path / "experiment"
    config = write_yaml(
        "ab",
        workload={"requests_per_family": 10, "exemplars": 1},
        sampling={"max_new_tokens": 100, "temperature": 1.0, "ignore_eos": True},
        checkpoint_seconds=0.5,
        replicates=1,
    )
    first = start(config, path, command="ab")
    _wait_for_requests(first, path / "cache_on", 5)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(60)
    time.sleep(1)
    done = cli("ab", config, "--output", path, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 40 of 40 requests" in done.stdout
    run = load_run(path / "cache_on")
    assert [s["seconds"] is None for s in run.manifest["starts"]] == [True, False]
    assert run.tokens()["rid"].nunique() == 20

    other = write_yaml("ab", workload={"requests_per_family": 10, "exemplars": 1}, dtype="float32", replicates=1)
    refused = cli("ab", other, "--output", path, "--resume")
    assert refused.returncode == 2
    assert "was recorded with another" in refused.stderr


def test_a_fault_of_the_probe_leaves_requests_alone_and_is_reported(tmp_path: Path) -> None:
    """The rows folder cannot be made: recording stops, says why, and the engine answers as without the probe."""
    (tmp_path / "rows").write_text("in the way")
    code = (
        "from pathlib import Path\n"
        "from sglang_probe.harvest.engine import ProbedEngine\n"
        "from sglang_probe.engine.hooks.config import EngineProbeConfig\n"
        "from sglang_probe.errors import ProbeError\n"
        "if __name__ == '__main__':\n"
        f"    probe = EngineProbeConfig(run=Path({str(tmp_path)!r}), hook_points=['hook_embed'],\n"
        "                              checkpoint_seconds=0.01)\n"
        f"    with ProbedEngine({str(MODEL)!r}, probe, {{}}) as engine:\n"
        "        params = {'max_new_tokens': 30, 'temperature': 0.0, 'ignore_eos': True}\n"
        "        answers = [engine.run(engine.generate(f'r{i}', range(50, 90), params)) for i in range(3)]\n"
        "        assert [len(a.output_ids) for a in answers] == [30] * 3\n"
        "        assert answers[0].output_ids == answers[2].output_ids\n"
        "        try:\n"
        "            engine.close_recording()\n"
        "        except ProbeError as e:\n"
        "            print('REPORTED', e)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "REPORTED" in done.stdout
    assert "the writer stopped" in (tmp_path / "fault.txt").read_text()
    assert "sglang-probe stopped recording" in done.stderr + done.stdout


def _scheduler_of(harvest: Started) -> psutil.Process:
    return next(
        p for p in psutil.Process(harvest.pid).children(recursive=True) if any("scheduler" in a for a in p.cmdline())
    )


def _wait_for_requests(process: Started, path: Path, count: int, timeout: float = 600) -> None:
    """Wait until that many requests are on disk."""
    deadline = time.time() + timeout
    while time.time() < deadline:
        assert process.poll() is None, "the harvest ended before it could be interrupted"
        if (path / MANIFEST).exists() and len(load_run(path).engine_requests()) >= count:
            return
        time.sleep(0.1)
    pytest.fail(f"{count} requests were not on disk after {timeout} s")


def _alive(group: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter(["pid"]):
        try:
            if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
