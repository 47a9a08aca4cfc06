"""Samples are whole, whoever computed their rows, and what is not whole is left out and said."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.run import Run
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
