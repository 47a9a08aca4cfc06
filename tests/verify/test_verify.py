"""Each invariant holds on a good run, and each way to break it is found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sglang_probe.run import journal, schema
from sglang_probe.run.run import Run
from sglang_probe.verify.ownership import hash_rows, write_oracle
from sglang_probe.verify.verify import spans_tile, verify
from tests.made_run import EMBEDDING


def test_a_good_run_holds_and_every_check_covers_something(make_run: Callable[..., Run]) -> None:
    checks = verify(make_run(), embedding=EMBEDDING)
    assert {c.name: (c.covered, c.violation) for c in checks} == {
        "files": (6, None),  # rows of two hook points, and four tables
        "cells": (16, None),
        "requests": (2, None),
        "tiling": (2, None),
        "attempts": (6, None),
        "phases": (5, None),
        "reuse": (2, None),
        "forwards": (4, None),
        "lineage": (4, None),
        "rebinds": (0, None),
        "manifest": (5, None),
        "tree": (4, None),  # of the recording, two matches and a publication
        "causes": (8, None),
        "row ownership": (12, None),
        "rows": (24, None),
        "content": (12, None),
    }


@pytest.mark.parametrize(
    ("rebind", "violation"),
    [
        (("a", 0, 4, 1, "b"), "b never computed it"),  # b reuses these from a
        (("b", 4, 6, 3, "a"), "the tokens of origin a differ"),
        (("b", 4, 6, 1, "a"), "it had not computed it"),  # at its own forward
        (("a", 4, 6, 3, "nobody"), "nobody never computed it"),
        (("b", 4, 6, 2, "a"), "the tokens of origin a differ"),
        (("b", 4, 6, 3, None), "of no origin"),
    ],
)
def test_a_wrong_rebind_is_named(make_run: Callable[..., Run], rebind: Any, violation: str) -> None:
    run = make_run()
    rid, start, end, forward, origin = rebind
    facts = [(0, rid, 0, start, end, forward, origin, None if origin is None else 0)]
    frame = pd.DataFrame(facts, columns=["dp_rank", *schema.REBINDS.names])
    run.rebinds = lambda: frame  # type: ignore[method-assign]
    (check,) = [c for c in verify(run) if c.name == "rebinds"]
    assert violation in (check.violation or "")


def test_tokens_expand_every_position_once(make_run: Callable[..., Run]) -> None:
    tokens = make_run().tokens()
    b = tokens[tokens["rid"] == "b"].sort_values("position")
    assert b["status"].tolist() == ["reused"] * 4 + ["computed"] * 4
    assert b["phase"].iloc[4:].tolist() == ["prefill", "prefill", "decode", "overshoot"]
    assert b["segment"].tolist() == ["system"] * 4 + ["user"] * 2 + ["generated"] * 2
    assert b["token_id"].tolist() == [3, 4, 5, 6, 9, 10, 14, 1]
    assert b["forward_id"].tolist() == [1, 1, 1, 1, 1, 1, 2, 3]
    assert b["row"].tolist() == [-1, -1, -1, -1, 6, 7, 9, 11]


def test_a_run_in_which_nothing_was_served_can_be_read(make_run: Callable[..., Run]) -> None:
    run = make_run()
    table = pq.read_table(run.path / "requests.parquet")
    pq.write_table(table.slice(0, 0), run.path / "requests.parquet")
    assert len(run.tokens()) == 0
    assert list(run.tokens().columns) == list(make_run("other").tokens().columns)


def test_rows_come_back_in_the_order_asked(make_run: Callable[..., Run]) -> None:
    rows = make_run().rows("hook_embed", [11, 0, 6])
    assert rows.equal(EMBEDDING[[1, 3, 9]])


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (lambda s: s[s["status"] != "reused"], ("tiling", "gap in b at position 0")),
        (lambda s: _set(s, s["status"] == "reused", end=5), ("tiling", "overlap in b at position 4")),
        (lambda s: _set(s, s["phase"] == "overshoot", phase="decode"), ("tiling", "b: spans end at 8, expected 7")),
        (lambda s: s[~((s["rid"] == "a") & (s["phase"] == "decode"))], ("tiling", "a: spans end at 6, expected 8")),
        (lambda s: _set(s, s["phase"] == "prefill", forward_id=0), ("forwards", "forward 0: spans hold 8 tokens")),
        (
            lambda s: _set(s, (s["rid"] == "b") & (s["phase"] == "prefill"), row_start=0),
            ("row ownership", "row 0 has 2"),
        ),
        (
            lambda s: _set(s, s["phase"] == "overshoot", row_start=99),
            ("row ownership", "claims row 99, which does not exist; 12 do"),
        ),
        (lambda s: _set(s, s["status"] == "reused", end=3), ("reuse", "b: 3 reused in the ledger, 4 by SGLang")),
        (
            lambda s: _set(s, s["phase"] == "overshoot", forward_id=7),
            ("forwards", "b positions 7 to 8: forward 7 is not in the run"),
        ),
        (
            lambda s: _set(s, s["phase"] == "decode", phase="prefill", chunk=1, row_step=1),
            ("phases", "positions 6 to 8 of attempt 0 cannot be prefill"),
        ),
        (
            lambda s: _set(s, s["phase"] == "prefill", phase="decode", chunk=-1),
            ("phases", "a positions 0 to 6 of attempt 0 cannot be decode"),
        ),
        (
            lambda s: pd.concat([s, _attempts("a", (0, 6, "recompute"), (6, 7, "decode"))]),
            ("phases", "a: attempt 0 kept 8 positions, and attempt 1 prefills 6"),
        ),
    ],
    ids=[
        "gap",
        "overlap",
        "hidden overshoot",
        "lost decode",
        "wrong forward",
        "two owners",
        "no such row",
        "reuse",
        "no such forward",
        "decode as prefill",
        "prefill as decode",
        "a step kept that was discarded",
    ],
)
def test_a_broken_ledger_is_found(make_run: Callable[..., Run], broken: Any, named: tuple[str, str]) -> None:
    run = make_run()
    _rewrite_spans(run.path, broken)
    violations = {c.name: c.violation for c in verify(run) if not c.holds}
    name, words = named
    assert words in (violations.get(name) or ""), violations


def test_two_requests_with_swapped_rows_are_found_by_content_alone(make_run: Callable[..., Run]) -> None:
    run = make_run()
    spans = run.spans()
    a = spans[(spans["rid"] == "a") & (spans["phase"] == "decode")]["row_start"].iloc[0]
    b = spans[(spans["rid"] == "b") & (spans["phase"] == "decode")]["row_start"].iloc[0]

    def swap(s: pd.DataFrame) -> pd.DataFrame:
        # Row 8 and 9 belong to the first decode step of a and b; cut a's run so that only this step is swapped.
        decode_a = s[(s["rid"] == "a") & (s["phase"] == "decode")].iloc[0]
        tail = decode_a.copy()
        tail["start"], tail["forward_id"], tail["row_start"] = decode_a["start"] + 1, decode_a["forward_id"] + 1, 10
        tail["row_step"] = 1
        s = _set(s, (s["rid"] == "a") & (s["phase"] == "decode"), end=decode_a["start"] + 1, row_start=b, row_step=1)
        s = _set(s, (s["rid"] == "b") & (s["phase"] == "decode"), row_start=a)
        return pd.concat([s, tail.to_frame().T])

    _rewrite_spans(run.path, swap)
    by_consistency = verify(run)[-2]
    assert by_consistency.name == "consistency", "without an oracle the check does not claim content"
    assert by_consistency.holds, "tokens that occur once cannot be told apart"
    from_matrix = verify(run, embedding=EMBEDDING)
    write_oracle(run, EMBEDDING, range(50))
    for checks in (from_matrix, verify(run)):
        assert [c.name for c in checks if not c.holds] == ["content"]
        assert "2 of 12 rows are wrong" in str(checks[-2].violation)


def test_a_request_that_ends_twice_is_found(make_run: Callable[..., Run]) -> None:
    run = make_run()
    again = pa.concat_tables([pq.read_table(f) for f in sorted((run.path / "ledger").glob("requests-*.parquet"))] * 2)
    _rewrite(run.path, "ledger/requests-00000.parquet", again)
    assert "ended more than once" in str({c.name: c.violation for c in verify(run)}["tiling"])


def test_a_changed_and_a_missing_file_are_found(make_run: Callable[..., Run]) -> None:
    run = make_run()
    shard = run.path / "rows/hook_embed/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert "was changed" in str(verify(run)[0].violation)
    run = make_run("second")
    (run.path / "ledger/forwards-00000.parquet").unlink()
    assert [c.violation for c in verify(run)] == ["ledger/forwards-00000.parquet is missing"]


def test_the_hash_of_a_row_depends_on_every_bit_and_not_on_its_neighbours() -> None:
    hashes = hash_rows(EMBEDDING)
    assert len(set(hashes.tolist())) == 50
    assert hash_rows(EMBEDDING[[7]])[0] == hashes[7]
    flipped = EMBEDDING.clone()
    flipped.view(torch.int16)[7, 3] ^= 1
    assert hash_rows(flipped)[7] != hashes[7]


def _attempts(rid: str, *computed: tuple[int, int, str]) -> pd.DataFrame:
    """Computed spans of attempt 1."""
    rows = [
        dict(zip(schema.SPANS.names, (rid, 1, a, b, "computed", p, 9, c, None, 0, 1, *[None] * 3), strict=True))
        for a, b, p in computed
        for c in [-1 if p == "decode" else 0]
    ]
    return pd.DataFrame(rows)


def _set(spans: pd.DataFrame, where: Any, **values: Any) -> pd.DataFrame:
    spans = spans.copy()
    for column, value in values.items():
        spans.loc[where, column] = value
    return spans


def _rewrite_spans(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the spans on disk, as a bug in the recorder would have."""
    changed = change(pq.read_table(path / "ledger/spans-00000.parquet").to_pandas())
    _rewrite(
        path, "ledger/spans-00000.parquet", pa.Table.from_pandas(changed, schema=schema.SPANS, preserve_index=False)
    )


def _rewrite(path: Path, name: str, table: pa.Table) -> None:
    """Replace a table on disk, and its recorded hash."""
    (part,) = journal.read(path)
    part.files[name] = journal.write_durably(path / name, lambda p: pq.write_table(table, p))
    (path / journal.NAME).unlink()
    journal.append(path, part)


@pytest.mark.parametrize(
    ("phase", "reason", "violation"),
    [
        ("recompute", "abort", None),
        ("recompute", "length", "a: spans end at 9, expected 8"),
        ("prefill", "abort", "a: spans end at 9, expected 8"),
    ],
)
def test_an_abort_after_a_recompute_leaves_the_last_sampled_token_with_an_entry(
    make_run: Callable[..., Run], phase: str, reason: str, violation: str | None
) -> None:
    """Found by attack, seed 121: retracted, computed again up to its last token, and dropped before the next one."""
    run = make_run()
    spans, requests = run.last_attempt(), run.requests(interrupted=True)
    last = spans.index[(spans["rid"] == "a") & (spans["end"] == 8)]
    spans.loc[last, ["end", "phase"]] = [9, phase]
    requests.loc[requests["rid"] == "a", "finish_reason"] = reason
    run.last_attempt = lambda: spans  # type: ignore[method-assign]
    run.requests = lambda **_: requests  # type: ignore[method-assign]
    assert spans_tile(run).violation == violation


def test_an_abort_after_a_recompute_of_a_prompt_that_sampled_nothing_leaves_the_prompt_alone(
    make_run: Callable[..., Run],
) -> None:
    """Found by attack, seed 2 at another speed: retracted in its prefill, computed again, and dropped."""
    run = make_run()
    spans, requests = run.last_attempt(), run.requests(interrupted=True)
    of_a = requests["rid"] == "a"
    prompt = int(requests.loc[of_a, "prompt_len"].iloc[0])
    spans = spans[(spans["rid"] != "a") | (spans["end"] <= prompt)].copy()
    last = spans.index[(spans["rid"] == "a") & (spans["end"] == prompt)]
    assert len(last) == 1
    spans.loc[last, "phase"] = "recompute"
    requests.loc[of_a, ["output_len", "finish_reason"]] = [0, "abort"]
    run.last_attempt = lambda: spans  # type: ignore[method-assign]
    run.requests = lambda **_: requests  # type: ignore[method-assign]
    assert spans_tile(run).violation is None
