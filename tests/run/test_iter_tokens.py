"""Runs that are read some requests at a time are read as they are from one frame."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.export.contexts import cut
from sglang_probe.export.hf import export_hf
from sglang_probe.export.saelens import _contexts
from sglang_probe.run import batches
from sglang_probe.run import tokens as positions
from sglang_probe.run.batches import by_position, in_parts
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.schema import INTERRUPTED
from sglang_probe.run.tokens import TokenFrames
from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.coverage.prompts import PromptCoverage, coverage_by_segment
from sglang_probe.studies.drift import Compared, compare_runs, drift_table, in_common
from sglang_probe.studies.lens.positions import drawn_positions, next_tokens, window_of
from tests.rows_run import Text, write_run

POINT = "blocks.0.hook_resid_post"
IN_ONE = 1 << 40


def long_run(path: Path, seed: int = 0) -> Run:
    """Forty texts of families of four; all but the first of a family reuse its beginning, and submission is in another
    order than that of the names."""
    rng = np.random.default_rng(3)
    noise = torch.Generator().manual_seed(seed)
    texts, rows = {}, {}
    for n in rng.permutation(40).tolist():
        family = n // 4
        first = min((int(t[1:]) for t in texts if int(t[1:]) // 4 == family), default=None)
        own = rng.integers(0, 50, int(rng.integers(1, 20))).tolist()
        prefix = [family] * 12
        ids, output = prefix + own, rng.integers(0, 50, int(rng.integers(1, 9))).tolist()
        segments = [("system", 0, 12), ("user" if n % 3 else "question", 12, len(ids))]
        reuses = None if first is None else (f"t{first}", 11)
        texts[f"t{n}"] = Text(ids, output, f"f{family}", reuses, segments)
        rows[f"t{n}"] = torch.randn((len(ids) + len(output) - 1, 6), generator=noise).to(torch.bfloat16)
    return write_run(path, texts, {POINT: rows})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return long_run(tmp_path / "run")


@pytest.fixture
def in_one_frame(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many positions a frame has."""

    def set_part(n: int) -> None:
        monkeypatch.setattr(batches, "_PART", n)
        monkeypatch.setattr(Run, "iter_tokens", lambda self: positions.iter_tokens(self, n))

    return set_part


@pytest.mark.parametrize("size", [1, 50, 200, IN_ONE])
def test_frames_are_the_frame_in_parts(run: Run, size: int) -> None:
    frames = list(run.iter_tokens(size))
    assert (len(frames) == 1) == (size == IN_ONE)
    assert all(len(f) < size + 50 for f in frames)
    pd.testing.assert_frame_equal(pd.concat(frames, ignore_index=True), run.tokens())


def test_frames_of_named_requests_are_those_of_the_frame(run: Run, make_run: Callable[..., Run]) -> None:
    whole = run.tokens()
    mine = TokenFrames(run).of(["t31", "t4", "unknown"])
    wanted = whole[whole["rid"].isin(["t31", "t4"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, wanted)
    small = make_run("small")  # with a discarded step
    pd.testing.assert_frame_equal(pd.concat(small.iter_tokens(1), ignore_index=True), small.tokens())


@pytest.mark.parametrize(
    ("where", "apart"),
    [
        ("position >= 3 and segment != 'system'", True),
        ("segment in ['user', 'generated'] & ~(phase == 'decode')", True),
        ("rid.str.startswith('t1') and row.isna() == False", True),
        ("token_id % 2 == 0", True),
        ("position > position.mean()", False),
        ("index < 40", False),
        ("row == row.max()", False),
        ("`position` < 4", False),
        ("position.rank() > 100", False),
        ("row in token_id", False),
        ("row not in position", False),
        ("token_id.isin(position)", False),
        ("position == [1, token_id]", False),
        ("token_id in [1, 2] or position.isin((3, 4))", True),
        ("position == [-1, 4] and segment not in ['user']", True),
    ],
)
def test_a_query_chooses_the_same_positions_in_parts(
    run: Run, in_one_frame: Callable[[int], None], where: str, apart: bool
) -> None:
    assert by_position(where) == apart
    in_one_frame(30)
    frames = list(in_parts(run, where))
    assert (len(frames) > 1) == apart
    found = pd.concat(frames)[["rid", "position"]].to_numpy().tolist()
    assert found == run.tokens().query(where)[["rid", "position"]].to_numpy().tolist()
    assert found


@pytest.mark.parametrize("where", ["position", "'user'", "position + 1"])
def test_a_query_that_is_not_true_or_false_of_each_position_is_refused(run: Run, where: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        list(in_parts(run, where))


def test_two_requests_of_one_name_are_refused(run: Run) -> None:
    file = run.path / REQUESTS_FILE
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), file)
    with pytest.raises(RunDirectoryError, match="twice"):
        next(run.iter_tokens())


def _amended(run: Run, change: Callable[[pd.DataFrame], None]) -> Run:
    """The run with other requests."""
    file = run.path / REQUESTS_FILE
    requests = pq.read_table(file).to_pandas()
    change(requests)
    pq.write_table(pa.Table.from_pandas(requests, schema=pq.read_schema(file), preserve_index=False), file)
    return load_run(run.path)


def _interrupt(requests: pd.DataFrame) -> None:
    requests.loc[[3, 7, 20], "finish_reason"] = INTERRUPTED


def _interrupt_all(requests: pd.DataFrame) -> None:
    requests["finish_reason"] = INTERRUPTED


def _drop_ids(requests: pd.DataFrame) -> None:
    for column in ("prompt_ids", "output_ids"):
        requests[column] = requests[column].where(requests.index % 3 != 0, None)


@pytest.mark.parametrize("change", [_interrupt, _drop_ids])
def test_interrupted_requests_and_those_without_token_ids_are_read_alike(
    run: Run, change: Callable[[pd.DataFrame], None]
) -> None:
    before = len(run.tokens())
    run = _amended(run, change)
    whole = run.tokens()
    for size in (1, 60, IN_ONE):
        pd.testing.assert_frame_equal(pd.concat(run.iter_tokens(size), ignore_index=True), whole)
    assert (len(whole) < before) == (change is _interrupt)
    assert (whole["token_id"] == -1).any() == (change is _drop_ids)


def test_a_run_that_served_nothing_has_no_frames_and_no_batches(run: Run, tmp_path: Path) -> None:
    other = long_run(tmp_path / "other")
    run = _amended(run, _interrupt_all)
    assert list(run.iter_tokens()) == []
    assert list(run.iter_batches(POINT, batch_size=4)) == []
    for pair in ((run, other), (other, run)):
        found = compare_runs(*pair)
        assert len(found.positions) == len(found.relative_l2[POINT]) == len(drift_table(found)) == 0


def test_batches_are_the_rows_of_the_frame(run: Run, in_one_frame: Callable[[int], None]) -> None:
    in_one_frame(20)
    tokens = run.tokens().query("position > 4 and segment != 'system'")
    for weight, column in (("unique", "row"), ("traffic", "source_row")):
        rows = tokens.loc[tokens[column] >= 0, column].to_numpy()
        found = torch.cat(
            list(
                run.iter_batches(
                    POINT, batch_size=16, where="position > 4 and segment != 'system'", weight=weight, shuffle=False
                )
            )
        )
        assert torch.equal(found.float(), run.rows(POINT, rows).float())
    assert len(rows) > 100


@pytest.mark.parametrize("kind", ["unique", "traffic", "file"])
def test_batches_are_the_same_whatever_the_parts(run: Run, in_one_frame: Callable[[int], None], kind: str) -> None:
    tokens = run.tokens()
    own = tokens[tokens["row"] >= 0]
    weights = own[["rid"]].assign(start=own["position"], end=own["position"] + 1, weight=own["position"] % 5 / 3)

    def rows() -> torch.Tensor:
        how = {"where": "position > 0", "weight": weights if kind == "file" else kind, "seed": 4}
        return torch.cat(list(run.iter_batches(POINT, batch_size=16, **how)))  # type: ignore[arg-type]

    in_one_frame(IN_ONE)
    whole = rows()
    in_one_frame(20)
    assert torch.equal(rows(), whole)
    assert len(whole) > 100


def test_coverage_is_counted_the_same_in_parts(run: Run) -> None:
    tokens = run.tokens()
    for whole, part in zip((tokens,), (run.iter_tokens(20),), strict=True):
        a, b = PromptCoverage(whole, width=8), PromptCoverage(part, width=8)
        pd.testing.assert_frame_equal(a.by_segment(), b.by_segment())
        pd.testing.assert_frame_equal(a.by_position(), b.by_position())
    prompt = tokens[tokens["segment"] != "generated"]
    found = coverage_by_segment(run.iter_tokens(20)).set_index("segment")
    by_hand = prompt.groupby("segment")["status"].agg(["size", lambda s: (s == "reused").sum()])
    assert found.drop(index="all")[["positions", "reused"]].to_numpy().tolist() == (
        by_hand.loc[found.index[:-1]].to_numpy().tolist()
    )


def test_an_export_has_the_same_bytes_whatever_the_parts(
    run: Run, tmp_path: Path, in_one_frame: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang_probe.export.hf._GROUP", 40)
    for name, part in (("whole", IN_ONE), ("parts", 17)):
        in_one_frame(part)
        export_hf(run, tmp_path / name, where="position > 1", rows_per_file=110)
    files = sorted((tmp_path / "whole" / "data").iterdir())
    assert len(files) > 2
    assert [pq.ParquetFile(f).metadata.num_rows for f in files[:-1]] == [110] * (len(files) - 1)
    for file in [*files, tmp_path / "whole" / "README.md"]:
        other = tmp_path / "parts" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("length", [3, 11, 25])
def test_contexts_for_sae_lens_are_the_same_whatever_the_parts(
    run: Run, in_one_frame: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    def contexts() -> tuple[list[list[int]], list[list[int]], int, int]:
        rows, ids, repeated, rest = [], [], 0, 0
        for source, token_ids, found in _contexts(run, POINT, length):
            rows += source[found.places].tolist()
            ids += token_ids[found.places].tolist()
            repeated, rest = repeated + found.repeated, rest + found.rest
        return rows, ids, repeated, rest

    in_one_frame(IN_ONE)
    whole = contexts()
    in_one_frame(17)
    assert contexts() == whole
    assert whole[0]
    assert length * (len(whole[0]) + whole[2]) + whole[3] == len(run.tokens())


def test_a_part_without_positions_has_no_contexts() -> None:
    nothing = np.zeros(0, bool)
    found = cut(np.zeros(0, np.int64), nothing, nothing, 4)
    assert (found.places.shape, found.repeated, found.rest) == ((0, 4), 0, 0)


@pytest.mark.parametrize("most", [30, 10_000])
def test_a_lens_draws_the_same_positions_whatever_the_parts(
    run: Run, in_one_frame: Callable[[int], None], most: int
) -> None:
    requests = run.requests().set_index("rid")

    def drawn() -> pd.DataFrame:
        def prepare(tokens: pd.DataFrame) -> pd.DataFrame:
            return tokens.assign(target=next_tokens(tokens, requests))

        frames = functools.partial(in_parts, run, "position > 2 and target >= 0", prepare=prepare)
        return drawn_positions(run, {0: POINT}, frames, most, seed=5)

    in_one_frame(IN_ONE)
    whole = drawn()
    in_one_frame(17)
    pd.testing.assert_frame_equal(drawn(), whole)
    tokens = run.tokens()
    after = tokens.set_index(["rid", "position"])["token_id"]
    known = [after.get((r, p + 1), t) for r, p, t in whole[["rid", "position", "target"]].itertuples(index=False)]
    assert whole["target"].tolist() == known
    # The draw is that of one frame of all positions that have a row of their own.
    own = tokens[(tokens["row"] >= 0) & (tokens["position"] > 2)].reset_index(drop=True)
    chosen = np.arange(len(own))
    if len(own) > most:
        chosen = np.sort(np.random.default_rng(5).choice(len(own), most, replace=False))
    assert whole[["rid", "position"]].to_numpy().tolist() == own.iloc[chosen][["rid", "position"]].to_numpy().tolist()


def test_the_map_of_a_lens_is_of_the_first_request_that_has_rows(run: Run) -> None:
    requests = run.requests().set_index("rid")
    first = requests.index[0]
    tokens = run.tokens()
    mine = tokens[(tokens["rid"] == first) & (tokens["source_row"] >= 0)]
    found = window_of(run, {0: POINT}, requests, None, 0, 10_000)
    assert found[["rid", "position", "row", "source_row"]].to_numpy().tolist() == (
        mine[["rid", "position", "row", "source_row"]].to_numpy().tolist()
    )


def test_a_comparison_is_that_of_merged_frames(tmp_path: Path, in_one_frame: Callable[[int], None]) -> None:
    a, b = (long_run(tmp_path / name, seed) for seed, name in enumerate("ab"))
    in_one_frame(23)
    found = compare_runs(a, b)
    own = [run.tokens().query("row >= 0") for run in (a, b)]
    both = own[0].merge(own[1], on=["rid", "position"], suffixes=("_a", "_b"))
    requests = b.requests().set_index("rid")
    assert found.positions["index"].tolist() == requests.loc[both["rid"], "index"].tolist()
    assert found.positions["cluster"].tolist() == requests.loc[both["rid"], "family"].tolist()
    assert found.positions["position"].tolist() == both["position"].tolist()
    for column in ("segment", "phase"):
        assert found.positions[column].tolist() == both[f"{column}_a"].tolist()
    wanted = row_distance(a.rows(POINT, both["row_a"].to_numpy()), b.rows(POINT, both["row_b"].to_numpy()))
    for measure, values in zip((found.relative_l2, found.cosine, found.deviation), wanted, strict=True):
        np.testing.assert_array_equal(measure[POINT], values.astype(np.float32))


def test_runs_are_compared_the_same_in_parts(tmp_path: Path, in_one_frame: Callable[[int], None]) -> None:
    a, b, c = (long_run(tmp_path / name, seed) for seed, name in enumerate("abc"))
    pairs = [(a, b), (a, c), (b, c)]
    until = a.requests().set_index("index")["prompt_len"] + 2

    def compared() -> list[Compared]:
        every = [compare_runs(x, y, until=until if y is c else None) for x, y in pairs]
        return in_common(every)

    in_one_frame(IN_ONE)
    whole = compared()
    in_one_frame(23)
    for found, wanted in zip(compared(), whole, strict=True):
        pd.testing.assert_frame_equal(found.positions, wanted.positions)
        for x, y in zip(*((p.relative_l2, p.cosine, p.deviation) for p in (found, wanted)), strict=True):
            assert np.array_equal(x[POINT], y[POINT])
            assert len(x[POINT]) > 100
