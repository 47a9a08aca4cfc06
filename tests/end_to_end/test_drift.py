"""`sglang-probe prove --accept-drift` on an SGLang with one changed file: proved and accepted, or refused by place.

The installed package with everything linked but the changed file, in front of it on `PYTHONPATH`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_probe.engine.releases import release
from sglang_probe.paths import cache_dir
from sglang_probe.run.manifest import MANIFEST

pytestmark = pytest.mark.engine
RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
SHORT = ("--requests", "8", "--rounds", "1", "--transformers", "2", "--dtype", "float32")


def altered(folder: Path, file: str, old: str, new: str) -> dict[str, str]:
    """Environment in which `old` is `new` in a file of SGLang, named from its package."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    source, at = Path(spec.submodule_search_locations[0]), folder / "site/sglang"
    for part in file.split("/"):
        at.mkdir(parents=True)
        for child in source.iterdir():
            if child.name not in (part, "__pycache__"):
                (at / child.name).symlink_to(child)
        source, at = source / part, at / part
    text = source.read_text()
    assert old in text
    at.write_text(text.replace(old, new))
    env = {"PYTHONPATH": str(folder / "site"), "SGLANG_PROBE_CACHE": str(folder / "cache")}
    # A cache of its own would have every module of SGLang compiled anew.
    return env | {"PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX") or str(cache_dir() / "pycache")}


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def test_what_every_recording_patches_is_gone(cli: Callable, tmp_path: Path) -> None:
    env = altered(tmp_path, "srt/managers/scheduler.py", "run_batch(", "run_the_batch(")
    done = cli("prove", "--accept-drift", *SHORT, **env)
    assert done.returncode == 2, said(done)
    assert RUN_BATCH in said(done).replace("\n", "")
    assert not list((tmp_path / "cache").rglob("sglang-*.json"))


@pytest.mark.slow
def test_a_changed_release_is_refused_then_proved_and_then_records(
    cli: Callable, write_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    more = "        self.forward_ct += 1\n        batch.forward_iter = self.forward_ct\n"
    env = altered(
        tmp_path, "srt/managers/scheduler.py", more, more + "        self.forward_ct = int(self.forward_ct)\n"
    )
    config = write_yaml("drifted", dtype="float32")
    refused = cli("harvest", config, "--output", tmp_path / "refused", **env)
    assert refused.returncode != 0
    assert "--accept-drift" in said(refused)
    proved = cli("prove", "--accept-drift", "--output", tmp_path / "certificate.json", *SHORT, **env)
    assert proved.returncode == 0, said(proved)
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    accepted = json.loads(next((tmp_path / "cache/drift").glob("*.json")).read_text())
    assert accepted["certificate"] == certificate["sha256"]
    recorded = cli("harvest", config, "--output", tmp_path / "run", **env)
    assert recorded.returncode == 0, said(recorded)
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["status"] == "complete"


@pytest.mark.slow
@pytest.mark.skipif(release().version not in ("0.5.22", "0.5.23"), reason="the residual stream is written otherwise")
def test_what_a_change_broke_is_named_with_the_place(cli: Callable, tmp_path: Path) -> None:
    """A snapshot that leaves the residual out: every row of the residual stream is wrong, and nothing crashes."""
    file = "srt/layers/layer_boundary/residual/stream.py"
    old = "        if pending is None:\n            return hidden.clone()\n        if not pending.update.is_plain_add:"
    env = altered(tmp_path, file, old, old.replace("if pending is None:", "if pending is None or hidden is not None:"))
    done = cli("prove", "--accept-drift", *SHORT, **env)
    assert done.returncode == 1, said(done)
    told = said(done)
    assert "FAILED reference" in told
    assert "changed: sglang.srt.layers.layer_boundary.residual.stream.ResidualStream.snapshot (rows): changed" in told
    assert not list((tmp_path / "cache").rglob("drift/*.json"))
