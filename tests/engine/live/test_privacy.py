"""What is written of prompts and outputs, at each level."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from sglang_probe.config import load_config
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.ledger import part
from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.ledger.part import OpenPart
from sglang_probe.engine.live import overflow, privacy
from sglang_probe.engine.live.overflow import Overflow
from sglang_probe.engine.live.privacy import Redactor
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.run import schema
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


def test_prompts_are_hashed_by_the_writers_thread_and_nobodys_next_step_waits(
    make_engine: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, hashed = [], privacy.keyed_prefix_hashes

    def noting(ids: object, key: bytes) -> object:
        threads.append(threading.current_thread().name)
        return hashed(ids, key)

    monkeypatch.setattr(privacy, "keyed_prefix_hashes", noting)
    engine = make_engine(privacy="hashes")
    engine.serve("a", SECRET)
    engine.flush()
    assert threads == ["sglang-probe-writer"]


def ended(prompt: list[int], level: privacy.Privacy = "hashes") -> Commit:
    """The commit with which a request of this prompt ends, as the writer gets it."""
    request = dict.fromkeys(schema.ENGINE_REQUESTS.names) | {"rid": "a", "output_ids": [99]}
    commit = Commit(requests=[tuple(request.values())])
    redactor = Redactor(level)
    redactor.ending("a", prompt)
    redactor.apply(commit)
    return commit


def test_a_prompt_cannot_be_written_as_it_is() -> None:
    (prompt,) = ended(SECRET).prompts
    with pytest.raises(TypeError, match="not iterable"):
        part._table(schema.PROMPTS, [prompt])  # type: ignore[list-item]
    told = dict(zip(schema.PROMPTS.names, prompt.told(), strict=True))
    assert told["prompt_ids"] is None
    assert len(told["prefix_hashes"]) == 5
    assert not set(told["prefix_hashes"].tolist()) & {*SECRET, 99}


def test_a_long_list_is_read_in_pieces_and_whole() -> None:
    ids = list(range(2 * privacy._AT_ONCE + 5))
    assert ended(ids, "ids").prompts[0].told()[1].tolist() == ids


def test_prompts_that_wait_for_the_disk_are_counted_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = ended(list(range(99)))
    assert part.size_of(commit) == 800
    monkeypatch.setattr(overflow, "_PROMPT_BYTES", 2000)
    late = Overflow()
    for _ in range(5):
        late.absorb(ended(list(range(99))))
    released = late.release()
    assert released is not None
    assert (len(released.requests), len(released.prompts)) == (5, 2)
    late.absorb(commit)
    assert len(late.release().prompts) == 1  # type: ignore[union-attr]
    monkeypatch.setattr(part, "_SHARD_BYTES", 1500)
    open_part = OpenPart()
    open_part.take(commit)
    assert not open_part.full
    open_part.take(commit)
    assert open_part.full


def test_a_segment_is_full_before_prompts_would_block_the_scheduler(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(privacy="hashes")
    segment = engine.live.segment
    assert not segment.full
    segment.writer._max_waiting_bytes, segment.writer._taken_bytes = 1000, 501
    assert segment.full
    segment.writer._taken_bytes = 0
