"""Samples are whole, whoever computed their rows, and what is not whole is left out and said."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run.run import Run, load_run
from sglang_probe.run.selection import RowsConfig
from tests.made_run import QUERY
from tests.rows_run import Text, write_run

POINTS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


def _rows(seed: int, n: int) -> torch.Tensor:
    return torch.randn((n, 4), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`b` reuses four positions of `a`, and `c` six of `b`, four of which are `a`'s."""
    prefix = [5, 6, 7, 8]
    texts = {
        "a": Text([*prefix, 9], [10, 11], segments=[("user", 0, 3), ("assistant", 3, 5)]),
        "b": Text([*prefix, 12, 13], [14, 19], reuses=("a", 4)),
        "c": Text([*prefix, 12, 13, 15], [16, 17, 18], reuses=("b", 6)),
    }
    rows = {}
    for k, point in enumerate(POINTS):
        a, b, c = (_rows(10 * k + i, n) for i, n in enumerate((6, 7, 9)))
        b[:4], c[:6] = a[:4], torch.cat([a[:4], b[4:6]])
        rows[point] = {"a": a, "b": b, "c": c}
    return write_run(tmp_path_factory.mktemp("samples") / "run", texts, rows)


def test_a_sample_has_every_row_of_its_request_whoever_computed_it(run: Run) -> None:
    samples = run.samples()
    assert samples.rids == ["a", "b", "c"]
    assert len(samples) == 3
    for sample in samples:
        for point in POINTS:
            assert torch.equal(sample[point], run.activations(sample["rid"], point))
    assert samples[2]["input_ids"].tolist() == [5, 6, 7, 8, 12, 13, 15, 16, 17]
    assert samples[2]["loss_mask"].tolist() == [False] * 7 + [True] * 2
    assert samples[0]["loss_mask"].tolist() == [False] * 3 + [True] * 3
    assert run.samples(learned=["generated"])[0]["loss_mask"].tolist() == [False] * 5 + [True]
    assert samples[-1]["rid"] == "c"
    with pytest.raises(IndexError, match="no number 3"):
        samples[3]


def test_rows_that_are_shared_are_in_the_files_once(run: Run) -> None:
    samples = run.samples(POINTS[:1])
    assert int(samples.offsets[-1]) == 6 + 7 + 9
    assert run.row_count() == 6 + 3 + 3
    assert samples.rows_of(2)[:4].tolist() == samples.rows_of(0)[:4].tolist()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loader_takes_it_with_workers(run: Run, context: str) -> None:
    samples = run.samples(POINTS[1:])
    samples[0]  # what is mapped here is not sent along
    loader = DataLoader(samples, batch_size=None, shuffle=False, num_workers=1, multiprocessing_context=context)
    for sample, there in zip(loader, samples, strict=True):
        assert torch.equal(sample[POINTS[1]], there[POINTS[1]])
    assert len(pickle.dumps(samples)) < 20_000


def test_hugging_face_reads_them_as_they_are_asked_for(run: Run) -> None:
    pytest.importorskip("datasets")
    found = run.samples().to_hugging_face()
    assert found.num_shards == 3
    assert [x["rid"] for x in found.shuffle(seed=1, buffer_size=2)] != []
    for sample, there in zip(found, run.samples(), strict=True):
        assert torch.equal(torch.as_tensor(sample[POINTS[0]]), there[POINTS[0]])


def test_a_request_that_is_not_whole_is_left_out_with_the_reason(make_run: Callable[..., Run]) -> None:
    """`b` reuses what `a` computed, but of `a` only the last two prompt positions were selected."""
    run = make_run("partial", RowsConfig(window=2))
    with pytest.raises(RunDirectoryError, match="4 of 8 positions have no row: 4 not selected"):
        run.samples([QUERY])
    filled = run.samples([QUERY], missing="nan")[1]
    assert filled["rid"] == "b"
    assert torch.isnan(filled[QUERY][:, 0].float()).tolist() == [True] * 4 + [False] * 3
    assert torch.equal(filled[QUERY][4:], run.activations("b", QUERY, first=4))
    whole = make_run("whole")
    assert whole.samples().left_out == {}
    with pytest.raises(RunDirectoryError, match="requests are not whole; a: 4 of 8"):
        run.samples([QUERY], missing="raise")


def _changed(run: Run, *, spans: Callable[[pd.DataFrame], pd.DataFrame] = lambda s: s, **told: Any) -> Run:
    """The run as if it had other spans, or its requests table said something else of `a`."""
    found = load_run(run.path)
    frames = run.spans(), run.requests(interrupted=True).astype(object)
    first = frames[1].index[frames[1]["rid"] == "a"][0]
    for name, value in told.items():
        frames[1].at[first, name] = value
    found.spans = lambda: spans(frames[0].copy())  # type: ignore[method-assign]
    found.requests = lambda **_: frames[1]  # type: ignore[method-assign]
    return found


def _begins_at_3(spans: pd.DataFrame) -> pd.DataFrame:
    cut = (spans["rid"] == "a") & (spans["start"] < 3)
    spans.loc[cut, "row_start"] += 3 - spans.loc[cut, "start"]
    spans.loc[cut, "start"] = 3
    return spans


def _lacks_2_and_3(spans: pd.DataFrame) -> pd.DataFrame:
    first = spans[(spans["rid"] == "a") & (spans["start"] == 0)]
    rest = spans.drop(first.index)
    after = first.assign(start=4, row_start=first["row_start"] + 4)
    return pd.concat([first.assign(end=2), after, rest], ignore_index=True)


def _ends_with_the_prompt(spans: pd.DataFrame) -> pd.DataFrame:
    return spans[(spans["rid"] != "a") | (spans["phase"] != "decode")]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spans": _begins_at_3}, "its first 3 positions are in another run"),
        ({"spans": _lacks_2_and_3}, "the run has 4 positions of it, and it has 6"),
        ({"spans": _ends_with_the_prompt}, "the run has 5 positions of it, and it has 6"),
        ({"finish_reason": schema.CONTINUES}, "it goes on in the next segment"),
        (
            {"finish_reason": schema.ENDED_EARLIER, "prompt_len": None, "prompt_ids": None, "output_ids": None},
            "it ended in the segment before, and this one has its last step alone",
        ),
        ({"finish_reason": schema.INTERRUPTED}, "its engine ended before it did"),
        ({"finish_reason": schema.REFUSED}, "it was refused"),
    ],
)
def test_a_request_of_which_positions_are_elsewhere_is_no_sample(run: Run, change: dict[str, Any], why: str) -> None:
    changed = _changed(run, **change)
    with pytest.raises(RunDirectoryError, match=why):
        changed.samples(POINTS, missing="raise")
    samples = changed.samples(POINTS, missing="nan")
    assert samples.left_out == {"a": why}
    assert samples.rids == ["b", "c"]
    assert samples[0]["input_ids"].tolist() == [5, 6, 7, 8, 12, 13, 14]
