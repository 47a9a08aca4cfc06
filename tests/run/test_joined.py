"""Segments that are joined call each request by one name, and refuse what is of one segment alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.joined import Joined
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from tests.rows_run import Text, write_run

Origins = Mapping[str, str]


@pytest.fixture
def segment(tmp_path: Path) -> Callable[..., Path]:
    """Writes one. Spans of a request in `origins` are said to be of entries of another."""

    def write(
        number: int,
        rids: Sequence[str],
        *,
        carried: Sequence[str] = (),
        goes_on: Sequence[str] = (),
        late: Sequence[str] = (),
        origins: Origins | None = None,
        still_open: bool = False,
    ) -> Path:
        path = tmp_path / f"segment-{number:05d}"
        run = write_run(path, {rid: Text([1, 2, 3], [4, 5]) for rid in rids}, {})
        told = {"number": number, "first_of_process": number == 0, "carried_in": {r: [0, 0] for r in carried}}
        (path / MANIFEST).write_text(json.dumps({**run.manifest, "segment": told}))
        for file in path.glob("ledger/spans-*.parquet"):
            frame = pq.read_table(file).to_pandas()
            frame["origin_rid"] = frame["rid"].map(dict(origins or {}))
            pq.write_table(pa.Table.from_pandas(frame, schema.SPANS, preserve_index=False), file)
        requests = pq.read_table(path / REQUESTS_FILE).to_pandas()
        reasons = {**dict.fromkeys(goes_on, schema.CONTINUES), **dict.fromkeys(late, schema.ENDED_EARLIER)}
        requests["finish_reason"] = [reasons.get(r, "length") for r in requests["rid"]]
        pq.write_table(pa.Table.from_pandas(requests, schema.REQUESTS, preserve_index=False), path / REQUESTS_FILE)
        if still_open:
            (path / REQUESTS_FILE).unlink()
            for file in path.glob("ledger/requests-*.parquet"):
                pq.write_table(schema.ENGINE_REQUESTS.empty_table(), file)
        return path

    return write


def _spans(run: Run) -> list[tuple[str, Any]]:
    spans = run.spans()
    origin = spans["origin_rid"].astype(object)
    pairs = zip(spans["rid"], origin.where(origin.notna(), None), strict=True)
    return list(dict.fromkeys(pairs))


def test_a_request_keeps_its_name_in_a_segment_that_is_open_and_origins_have_it_too(
    segment: Callable[..., Path], tmp_path: Path
) -> None:
    run = Joined(
        tmp_path,
        [
            segment(0, ["a", "b"]),
            segment(1, ["c"]),
            segment(2, ["a", "b", "q"], goes_on=["a"], origins={"b": "a", "q": "a"}),
            segment(3, ["a"], carried=["a"], origins={"a": "b"}, still_open=True),
        ],
    )
    assert _spans(run) == [
        ("a", None),
        ("b", None),
        ("c", None),
        ("a@2", None),
        ("b@2", "a@2"),
        ("q", "a@2"),
        ("a@2", "b@2"),
    ]
    assert sorted(run.requests()["rid"]) == ["a", "b", "b@2", "c", "q"]


def test_a_step_that_came_after_the_end_is_of_the_request_that_ended_and_a_later_name_is_another(
    segment: Callable[..., Path], tmp_path: Path
) -> None:
    run = Joined(
        tmp_path, [segment(0, ["a"]), segment(1, ["a", "b"], late=["a"]), segment(2, ["a", "c"], origins={"c": "b"})]
    )
    assert _spans(run) == [("a", None), ("b", None), ("a@2", None), ("c", "b")]


def test_an_entry_that_was_reused_before_its_name_was_given_again_is_of_the_former_request(
    segment: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [segment(0, ["a"]), segment(1, ["b"]), segment(2, ["q", "a", "r"], origins={"q": "a", "r": "a"})]
    assert _spans(Joined(tmp_path, paths))[2:] == [("q", "a"), ("a@2", None), ("r", "a@2")]


@pytest.mark.parametrize(
    "ask",
    [
        lambda run: run.rows("hook_embed", [0]),
        lambda run: run.tokens(),
        lambda run: run.tokens_of("a"),
        lambda run: run.samples(),
        lambda run: run.activations("a", "hook_embed"),
        lambda run: list(run.iter_batches("hook_embed", batch_size=1)),
        lambda run: run.rebinds(),
    ],
)
def test_what_is_of_one_segment_is_refused(
    segment: Callable[..., Path], tmp_path: Path, ask: Callable[[Run], pd.DataFrame]
) -> None:
    run = Joined(tmp_path, [segment(0, ["a"]), segment(1, ["b"])])
    with pytest.raises(RunDirectoryError, match="several segments"):
        ask(run)
