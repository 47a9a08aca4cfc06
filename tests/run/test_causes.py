"""Every computed position has one cause, and planted causes are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.causes import autopsy, causes_known
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.shared_prefixes import WINDOW
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
