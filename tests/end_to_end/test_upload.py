"""A harvest is copied while it is recorded, and finished on another machine; what is withheld was never copied."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sglang_probe.remote.download import download
from sglang_probe.remote.target import Target
from sglang_probe.run import journal
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify

pytest.importorskip("fsspec")
pytestmark = pytest.mark.engine


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that has its final name."""
    return {
        p.relative_to(folder).as_posix(): journal.sha256(p)
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


@pytest.mark.slow
def test_what_is_withheld_was_never_at_the_target(cli: Callable, tmp_path: Path) -> None:
    lines = [{"prompt": f"Write to jane.doe{i}@example.org about the function number {i}."} for i in range(6)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {
        "workload": {"source": "jsonl", "path": str(tmp_path / "mine.jsonl")},
        "sampling": {"max_new_tokens": 8, "temperature": 0.0},
        "checkpoint_seconds": 0.2,
        "concurrency": 1,
        "withhold": {"pii": ["email"]},
        "upload": {"to": f"file://{tmp_path}/there", "patience": 60},
    }
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(told))
    seen: set[tuple[str, str]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            seen.update(contents(tmp_path / "there").items())

    looking = threading.Thread(target=look)
    looking.start()
    done = cli("harvest", config, "--output", tmp_path / "run")
    over.set()
    looking.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "copied to file://" in done.stdout
    there = contents(tmp_path / "there")
    assert load_run(tmp_path / "there").manifest["withheld"]["positions"]["pii:email"] > 0
    assert there == contents(tmp_path / "run")
    assert {(n, d) for n, d in seen if n.split("/")[0] in ("rows", "ledger")} <= set(there.items())


@pytest.mark.slow
def test_a_harvest_whose_machine_is_lost_is_finished_from_its_copy(
    cli: Callable, write_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    there = Target(f"file://{tmp_path}/there")
    config = write_yaml(
        "lost",
        workload={"families": 3, "requests_per_family": 8},
        hook_points=["hook_embed"],
        sampling={"max_new_tokens": 24, "temperature": 0.0},
        concurrency=1,
        checkpoint_seconds=0.2,
        upload={"to": there.url, "patience": 60},
    )
    command = [sys.executable, "-m", "sglang_probe", "harvest", str(config), "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while "journal.jsonl" not in there.sizes():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = (tmp_path / "run").rename(tmp_path / "lost")
    assert not load_run(before).complete
    other = tmp_path / "run"  # of the other machine
    while (tmp_path / ".run.upload.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    download(there, other)
    done = cli("harvest", config, "--output", other, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    run = load_run(other)
    assert run.complete
    assert len(run.requests()) == 24
    assert all(check.violation is None for check in verify(run))
    assert contents(tmp_path / "there") == contents(other)
