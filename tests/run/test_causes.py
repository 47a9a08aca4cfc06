"""Every computed position has one cause, and planted causes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import shared_prefixes
from sglang_probe.run.causes import _sequences, _shared, autopsy, causes_known
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.shared_prefixes import WINDOW, SharedPrefixes
from sglang_probe.verify.causes import causes_add_up
from tests.made_run import make_run  # noqa: F401
from tests.small_cache import SmallCache

A = list(range(100, 200))
B = list(range(300, 400))
C = list(range(500, 600))


def causes(run: Run, rid: str) -> list[tuple[int, int, str]]:
    check = causes_add_up(run)
    assert check.holds, check.violation
    own = autopsy(run).pieces
    own = own[own["rid"] == rid]
    return list(zip(own["start"], own["end"], own["cause"], strict=True))


def test_a_first_request_was_never_seen_and_its_repetition_computes_the_last_token(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    assert cache.serve("b", A) == 99
    run = cache.close()
    assert causes(run, "a") == [(0, 100, "never seen")]
    assert causes(run, "b") == [(99, 100, "last token")]


def test_a_text_after_another_prefix_diverged_and_new_text_was_never_seen(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", [*A, 1, *B])
    cache.serve("b", [*A, 2, *B, *C])
    run = cache.close()
    assert causes(run, "b") == [(100, 101, "never seen"), (101, 201, "diverged"), (201, 301, "never seen")]
    pieces = autopsy(run).pieces.set_index("rid")
    assert set(pieces.loc["b", "nearest"]) == {"a"}
    assert set(pieces.loc["b", "common"]) == {100}


def test_fewer_tokens_than_a_window_are_no_text(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", [*A, 1, *B[: WINDOW - 1]])
    cache.serve("b", [*A, 2, *B[: WINDOW - 1]])
    assert causes(cache.close(), "b") == [(100, 100 + WINDOW, "never seen")]


def test_what_the_tree_had_and_lost_was_evicted(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    cache.evict(A, 40)
    assert cache.serve("b", A) == 40
    run = cache.close()
    assert causes(run, "b") == [(40, 99, "evicted"), (99, 100, "last token")]
    piece = autopsy(run).pieces.query("cause == 'evicted'").iloc[0]
    evicted = run.tree().query("event == 'evicted'")["order"].iloc[0] + (1 << 40)
    assert piece["since"] < evicted < piece["until"]


def test_what_was_there_and_not_given_without_an_eviction_is_a_violation(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    cache._held.clear()  # which nobody tells
    cache.serve("b", A)
    check = causes_add_up(cache.close())
    assert check.violation is not None
    assert "nothing was evicted" in check.violation


def test_a_flush_is_told_from_an_eviction(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    cache.flush()
    cache.serve("b", A)
    assert causes(cache.close(), "b") == [(0, 99, "flushed"), (99, 100, "last token")]


def test_a_page_that_is_not_shared_whole_is_rounded(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run", page=16)
    cache.serve("a", A)
    assert cache.serve("b", [*A[:60], 1, *C[:3]]) == 48
    assert cache.serve("c", A) == 96
    run = cache.close()
    assert causes(run, "b") == [(48, 60, "page rounding"), (60, 64, "never seen")]
    assert causes(run, "c") == [(96, 99, "page rounding"), (99, 100, "last token")]


def test_an_earlier_request_in_flight_has_not_published_yet(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.ask("a", A)
    cache.ask("b", A)
    cache.compute("a")
    cache.compute("b")
    for rid in "ab":
        cache.publish(rid)
        cache.end(rid)
    run = cache.close()
    assert causes(run, "a") == [(0, 100, "never seen")]
    assert causes(run, "b") == [(0, 99, "not yet published"), (99, 100, "last token")]


def test_an_earlier_request_may_never_publish(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.ask("a", A)
    cache.compute("a")
    cache.end("a")
    cache.serve("b", A)
    assert causes(cache.close(), "b") == [(0, 99, "never published"), (99, 100, "last token")]


def test_the_same_prefix_under_another_salt_is_of_another_namespace(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A, space="red")
    cache.serve("b", [*A, *C], space="blue")
    run = cache.close()
    assert causes(run, "b") == [(0, 100, "namespace"), (100, 200, "never seen")]
    assert "red" not in run.tree().to_csv()


def test_log_probabilities_are_asked_from_a_position_on(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    assert cache.serve("b", A, limit=30) == 30
    assert causes(cache.close(), "b") == [(30, 100, "logprob_start")]


def test_random_requests_sum_to_what_was_computed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cache = SmallCache(tmp_path / "run", page=4)
    pieces = [list(range(1000 * k, 1000 * k + int(rng.integers(3, 40)))) for k in range(1, 6)]
    served: list[list[int]] = []
    computed = 0
    for i in range(200):
        ids = [t for k in rng.permutation(5)[: int(rng.integers(1, 5))] for t in pieces[k]]
        computed += len(ids) - cache.serve(f"r{i}", ids, space=rng.choice(["x", "y"]))
        served.append(ids)
        if rng.random() < 0.2:
            cache.evict(served[int(rng.integers(0, len(served)))], int(rng.integers(0, 20)), space="x")
    run = cache.close()
    found = autopsy(run)
    assert causes_add_up(run).holds
    assert sum(found.by_cause().values()) == computed
    assert {"never seen", "diverged", "evicted", "page rounding", "namespace", "last token"} <= set(found.by_cause())


def test_an_older_run_says_that_nothing_of_it_was_recorded(make_run) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    run = make_run()
    for file in (run.path / "ledger").glob("tree-*"):
        file.unlink()
    journal = run.path / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line["files"] = {k: v for k, v in line["files"].items() if "tree-" not in k}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(run.path)
    assert not causes_known(run)
    with pytest.raises(RunDirectoryError, match="not recorded"):
        autopsy(run)


def test_withheld_token_ids_are_no_tokens_in_common(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    run = cache.close()
    table = pq.read_table(run.path / REQUESTS_FILE)
    ids = [[-1, *row[1:]] for row in table["prompt_ids"].to_pylist()]
    column = pa.array(ids, type=table.schema.field("prompt_ids").type)
    table = table.set_column(table.column_names.index("prompt_ids"), "prompt_ids", column)
    pq.write_table(table, run.path / REQUESTS_FILE)
    assert not causes_known(load_run(run.path))
    with pytest.raises(RunDirectoryError, match="withheld"):
        autopsy(load_run(run.path))


def test_what_a_flush_took_stays_flushed_when_a_part_came_again_and_was_evicted(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    cache.flush()
    cache.serve("s", [*A[:10], 1])
    cache.evict(A, 0)
    cache.serve("b", A)
    run = cache.close()
    assert causes(run, "b") == [(0, 10, "evicted"), (10, 99, "flushed"), (99, 100, "last token")]


def test_what_was_evicted_before_a_flush_stays_evicted(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run", page=5)
    cache.serve("a", A)
    cache.evict(A, 10)
    cache.flush()
    cache.serve("b", [*A[:70], *C])
    assert causes(cache.close(), "b") == [(0, 10, "flushed"), (10, 70, "evicted"), (70, 170, "never seen")]


def test_a_beginning_with_a_longer_end_lost_its_end_first(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", [*A, *B])
    cache.evict([*A, *B], 120)
    cache.flush()
    cache.serve("b", A)
    assert causes(cache.close(), "b") == [(0, 99, "flushed"), (99, 100, "last token")]


def test_a_later_segment_does_not_say_that_what_it_never_saw_is_new(tmp_path: Path) -> None:
    before, cache = SmallCache(tmp_path / "before"), SmallCache(tmp_path / "run")
    before.serve("a", A)
    before.evict(A, 40)
    cache._held = before._held  # the tree goes on
    assert cache.serve("b", A) == 40
    cache.serve("c", [*A, 1, *B])
    run = cache.close()
    assert causes(run, "b") == [(40, 100, "never seen")]
    manifest = json.loads((run.path / MANIFEST).read_text())
    for number, said in ((0, "never seen"), (1, "not seen in this segment")):
        (run.path / MANIFEST).write_text(json.dumps({**manifest, "segment": {"number": number}}))
        assert causes(load_run(run.path), "b") == [(40, 100, said)]


def crowded(path: Path, n: int) -> Run:
    """Prompts with a common beginning, of which the tree loses some again and again; pairs in flight together."""
    rng = np.random.default_rng(1)
    cache = SmallCache(path, page=2)
    for i in range(n):
        ids = [*A[: int(rng.integers(5, 30))], 1000 + i]
        cache.ask(f"r{i}", ids)
        other = cache.ask(f"s{i}", [*ids, 7])
        assert other <= len(ids)
        for rid in (f"r{i}", f"s{i}"):
            cache.compute(rid)
            if rng.random() < 0.8:
                cache.publish(rid)
            cache.end(rid)
        if rng.random() < 0.5:
            cache.evict(A, int(rng.integers(0, 25)))
    return cache.close()


def test_when_the_tree_had_a_prefix_is_what_its_events_say(tmp_path: Path) -> None:
    run = crowded(tmp_path / "run", 40)
    known = SharedPrefixes(*_shared(_sequences(run)), run.tree())
    sequences = {str(r.rid): [*r.prompt_ids, *r.output_ids] for r in run.requests().itertuples()}
    tree = run.tree()
    tree = tree[tree["rid"].notna()].assign(order=tree["order"] + (1 << 40))
    asked = tree[tree["event"] == "matched"].set_index("rid")["order"].to_dict()
    for rid, own in list(sequences.items())[::5]:
        i, until = known.row_of[rid], asked[rid]
        for position in range(0, len(own), 3):
            alike = [r for r, s in sequences.items() if s[: position + 1] == own[: position + 1]]
            had = tree[tree["rid"].isin(alike) & (tree["end"] > position)]
            before = had.loc[had["order"] < until, "order"]
            assert known.last_had(i, position, until) == (before.max() if len(before) else -1)
            for after in (until, until + 1):  # then it had asked itself, and its own events do not count
                later = had[(had["order"] > after) & (had["rid"] != rid) & (had["rid"].map(asked) < after)]
                assert known.published_after(i, position, after) == (len(later) > 0)
            earlier = [r for r in alike if asked[r] < until]
            nearest = max(earlier, key=asked.__getitem__, default=None)
            r = known.nearest(i, position + 1, until)
            assert (None if r < 0 else known.names[r]) == nearest


def test_the_work_grows_with_the_tokens_and_not_with_pairs_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = crowded(tmp_path / "run", 60)
    read: list[int] = []
    made = shared_prefixes._Times

    def counted(orders: Any, last: Any, latest: Any) -> Any:
        read.append(len(last))
        return made(orders, last, latest)

    monkeypatch.setattr(shared_prefixes, "_Times", counted)
    autopsy(run)
    ended = run.engine_requests()
    assert 0 < sum(read) <= int((ended["prompt_len"] + ended["output_len"]).sum())


def test_a_run_that_does_not_say_its_page_size_says_no_causes(tmp_path: Path) -> None:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", A)
    run = cache.close()
    assert causes_known(run)
    manifest = json.loads((run.path / MANIFEST).read_text())
    (run.path / MANIFEST).write_text(json.dumps({**manifest, "server_resolved": {}}))
    assert not causes_known(load_run(run.path))
