"""What a trainer of drafters reads is every sample whole, in the layout that it documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.export.eagle import export_eagle
from sglang_probe.run.run import Run, load_run
from tests.export.readers import speculators_samples
from tests.rows_run import Text, write_run

pytest.importorskip("datasets")
POINTS = [f"blocks.{i}.hook_resid_post" for i in (0, 2, 3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`b` reuses three positions of `a`, in a model of four layers."""
    texts = {"a": Text([5, 6, 7, 8], [9, 10, 11]), "b": Text([5, 6, 7, 12], [13, 14], reuses=("a", 3))}
    rows = {}
    for k, point in enumerate(POINTS):
        a, b = (torch.randn((n, 4), generator=torch.Generator().manual_seed(10 * k + n)) for n in (6, 5))
        b[:3] = a[:3]
        rows[point] = {"a": a.to(torch.bfloat16), "b": b.to(torch.bfloat16)}
    place = tmp_path_factory.mktemp("eagle") / "run"
    return write_run(place, texts, rows, model_config={"num_hidden_layers": 4})


def test_a_trainer_of_drafters_reads_every_sample_whole(run: Run, cli: Callable, tmp_path: Path) -> None:
    done = cli("export", "eagle", run.path, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "2 samples of 11 positions" in done.stdout
    assert "--target-layer-ids 1 3 4" in done.stdout
    a, b = speculators_samples(tmp_path / "out")
    assert b["input_ids"].tolist() == [5, 6, 7, 12, 13]
    assert b["loss_mask"].tolist() == [False] * 4 + [True]
    for sample, rid in ((a, "a"), (b, "b")):
        drafter = torch.cat([run.activations(rid, p) for p in POINTS[:2]], dim=1)
        assert torch.equal(sample["hidden_states"], drafter)
        assert torch.equal(sample["verifier_last_hidden_states"], run.activations(rid, POINTS[2]))
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["rids"] == ["a", "b"]


@pytest.mark.parametrize(
    ("points", "told"),
    [
        (POINTS[:2], "not after the last of the model's 4 layers"),
        (POINTS[::-1], "in their order"),
        (POINTS[2:], "residual streams of one layer or more"),
        (["hook_embed", *POINTS], "hook_embed is no residual stream"),
    ],
)
def test_layers_that_a_trainer_would_misread_are_refused(
    run: Run, tmp_path: Path, points: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        export_eagle(run, tmp_path / "out", hook_points=points)
    assert not (tmp_path / "out").exists()


def _with(run: Run, rid: str, **columns: Any) -> Run:
    """The run as if its requests table said something else of one request."""
    real = run.requests

    def requests(**how: Any) -> pd.DataFrame:
        frame = real(**how).astype(object)
        for name, value in columns.items():
            frame[name] = [value if r == rid else old for r, old in zip(frame["rid"], frame[name], strict=True)]
        return frame

    found = load_run(run.path)
    found.requests = requests  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("told", [{"prompt_ids": [5, -1, 7, 12]}, {"prompt_ids": None, "output_ids": None}])
def test_a_request_whose_token_ids_are_not_known_is_left_out_and_the_others_are_written(
    run: Run, tmp_path: Path, told: dict[str, Any]
) -> None:
    samples = export_eagle(_with(run, "b", **told), tmp_path / "out")
    assert samples.rids == ["a"]
    assert samples.left_out == {"b": "a token id of it was withheld or not recorded"}
    (a,) = speculators_samples(tmp_path / "out")
    assert a["input_ids"].tolist() == [5, 6, 7, 8, 9, 10]
    assert not list((tmp_path / "out").glob(".cache*"))


def test_a_run_without_token_ids_is_refused(run: Run, tmp_path: Path) -> None:
    nothing = load_run(run.path)
    nothing.requests = lambda **how: run.requests(**how).assign(prompt_ids=None, output_ids=None)  # type: ignore[method-assign]
    with pytest.raises(RunDirectoryError, match="withheld or not recorded"):
        export_eagle(nothing, tmp_path / "out")


def test_texts_are_read_one_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("all samples are in memory at once")

    monkeypatch.setattr(Dataset, "from_dict", refuse)
    assert len(export_eagle(run, tmp_path / "out")) == 2
