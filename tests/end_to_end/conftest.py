"""Real engines, started once per session: each start costs half a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_probe.run.run import Run, load_run
from tests.end_to_end.live_server import LiveServer
from tests.end_to_end.paths import CHUNK

HOOK_POINTS = ["hook_embed", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post"]


@pytest.fixture(scope="session")
def pair(cli: Callable, write_yaml: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A paired experiment with chunked prefill, whose outputs are sampled at temperature 1.

    At temperature 1 two runs agree on their outputs only if forcing works.
    """
    folder = tmp_path_factory.mktemp("pair") / "experiment"
    config = write_yaml(
        "pair",
        sampling={"max_new_tokens": 40, "temperature": 1.0},
        hook_points=HOOK_POINTS,
        server={"chunked_prefill_size": 256},
    )
    done = cli("ab", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def runs(pair: Path) -> dict[str, Run]:
    return {p.parent.name: load_run(p.parent) for p in pair.glob("*/manifest.json")}


@pytest.fixture(scope="session")
def chunked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A recorded server with small chunks, four running requests and SGLang's own counts in its answers."""
    options = ["--chunked-prefill-size", str(CHUNK), "--max-running-requests", "4", "--enable-cache-report"]
    options += ["--enable-priority-scheduling", "--priority-scheduling-preemption-threshold", "0"]
    server = LiveServer(tmp_path_factory.mktemp("chunked"), *options, privacy="ids")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()
