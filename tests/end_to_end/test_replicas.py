"""Two real engines as actors of Ray, through the command: one killed, and the command itself killed."""

from __future__ import annotations

import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from sglang_probe.run import journal
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.attack.replicas import compare, configure, engine_of, harvest, once_each, wait_for_parts

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs `sglang-probe[ray]`"),
]


def _listens(command: int) -> dict[str, set[str]]:
    """Addresses on which the processes of a command listen, by what they are."""
    family = [psutil.Process(command), *psutil.Process(command).children(recursive=True)]
    names = {p.pid: p.name() for p in family if p.is_running()}
    found: dict[str, set[str]] = {}
    for c in psutil.net_connections("inet"):
        if c.status == psutil.CONN_LISTEN and c.pid in names:
            found.setdefault(names[c.pid], set()).add(c.laddr.ip.removeprefix("::ffff:"))
    return found


def test_two_replicas_with_one_killed_and_then_the_command_equal_one_engine(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    plain = harvest(configure(tmp_path / "one.yaml", concurrency=1, replicas=1, each=5), one)
    assert plain.wait() == 0, (tmp_path / "one.log").read_text()

    config = configure(tmp_path / "two.yaml", concurrency=1, replicas=2, each=5)
    command = harvest(config, two)
    wait_for_parts(two, 1, 2, command)
    listens = _listens(command.pid)
    assert {"gcs_server", "raylet"} <= listens.keys()
    of_ray = {name: where for name, where in listens.items() if not name.startswith("sglang")}
    assert set().union(*of_ray.values()) == {"127.0.0.1"}, listens
    engines = [engine_of(two, rank) for rank in (0, 1)]
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    while any(Path(f"/proc/{engine}").exists() for engine in engines):  # they end with it, and write until then
        time.sleep(0.02)
    before = len(journal.read_rank(two, 1))
    command = harvest(config, two, "--resume")
    wait_for_parts(two, 1, before + 1, command)
    os.kill(engine_of(two, 1), signal.SIGKILL)
    assert command.wait() == 0, (tmp_path / "two.log").read_text()

    run = load_run(two)
    assert run.complete
    assert [e["replica"] for e in run.manifest["replicas"]["ended"]] == [1]
    assert [str(c) for c in verify(run) if not c.holds] == []
    assert once_each(run)
    assert set(run.spans()["dp_rank"]) == {0, 1}
    found = compare(load_run(one), run, run.requests()["rid"].str.partition("~")[0])
    assert found.outputs == 0
    assert found.largest < 0.05, "a token of another request is further away than rounding"
