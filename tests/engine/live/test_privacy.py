"""What is written of prompts and outputs, at each level."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from sglang_probe.config import load_config
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.run.causes import autopsy
from sglang_probe.run.run import load_run
from sglang_probe.verify.causes import causes_add_up
from tests.engine.live.conftest import FakeEngine

SECRET = [41, 42, 43, 44]


def _ids_on_disk(root: Path) -> int:
    """Non-null values of columns that hold token ids, in all files."""
    tables = [pq.read_table(f) for f in root.rglob("*.parquet")]
    return sum(len(t) - t[c].null_count for t in tables for c in ("prompt_ids", "output_ids") if c in t.column_names)


@pytest.mark.parametrize("level", ["none", "hashes"])
def test_token_ids_are_not_written(level: str, make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(privacy=level)
    engine.serve("a", SECRET)
    engine.flush()
    assert _ids_on_disk(engine.live.root) == 0


def test_token_ids_are_written_if_asked(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(privacy="ids")
    engine.serve("a", SECRET)
    request = load_run(engine.flush()).requests().iloc[0]
    assert request["prompt_ids"].tolist() == SECRET
    assert request["output_ids"].tolist() == [99, 98, 97]
    assert pd.isna(request["prompt_hash"])


def test_hashes_recognise_equal_prompts_within_one_process_only(make_engine: Callable[..., FakeEngine]) -> None:
    seen = []
    for name in ("one", "two"):
        engine = make_engine(name, privacy="hashes")
        engine.serve("a", SECRET)
        engine.serve("b", SECRET[:-1])
        engine.serve("c", SECRET, reused=3)
        seen.append(load_run(engine.flush()).requests().set_index("rid")["prompt_hash"])
    assert seen[0]["a"] == seen[0]["c"] != seen[0]["b"]
    assert not set(seen[0]) & set(seen[1])


def test_rows_need_the_level_ids(tmp_path: Path) -> None:
    file = tmp_path / "probe.yaml"
    file.write_text("{run: x, hook_points: [hook_embed], live: {}}")
    with pytest.raises(ConfigError, match="privacy: ids"):
        load_config(file, EngineProbeConfig)
    file.write_text("{run: x, hook_points: [hook_embed], live: {privacy: ids, when_full: drop}}")
    with pytest.raises(ConfigError, match="cannot be dropped"):
        load_config(file, EngineProbeConfig)


def test_hashes_of_prefixes_say_why_a_prompt_was_not_reused(make_engine: Callable[..., FakeEngine]) -> None:
    found = {}
    for level in ("ids", "hashes"):
        engine = make_engine(level, privacy=level)
        engine.serve("a", list(range(40)))
        engine.serve("b", [*range(20), *range(50, 70)], reused=20)
        engine.serve("c", [*range(40), 99, 98], reused=41)
        run = load_run(engine.flush())
        assert causes_add_up(run).holds
        found[level] = autopsy(run).pieces.set_index("rid")
    assert found["hashes"]["common"].to_dict() == found["ids"]["common"].to_dict() == {"a": 0, "b": 20, "c": 42}
    assert found["hashes"]["nearest"].to_dict() == found["ids"]["nearest"].to_dict()
    assert found["hashes"]["cause"].to_dict() == {"a": "never seen", "b": "diverged", "c": "last token"}
    assert found["ids"].loc["b", "cause"] == "never seen"  # the text is known to be new


def test_without_prompts_causes_are_refused_with_what_to_do(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(privacy="none")
    engine.serve("a", SECRET)
    with pytest.raises(RunDirectoryError, match="hashes"):
        autopsy(load_run(engine.flush()))
