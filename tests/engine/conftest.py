"""Real engines, started once per session: each start costs half a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_probe.ledger.run import Run, load_run

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
