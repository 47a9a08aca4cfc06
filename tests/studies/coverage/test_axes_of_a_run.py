"""The study along axes of the user's own, and along every built-in axis against the naive loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sglang_probe.axes.batch import Batch
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run
from sglang_probe.studies.coverage import walk as walk_module
from sglang_probe.studies.coverage.families import find_families
from sglang_probe.studies.coverage.study import Study, study_coverage
from sglang_probe.studies.coverage.weights import write_weights
from tests.studies.coverage.conftest import random_traffic
from tests.studies.coverage.naive import naive
from tests.studies.coverage.test_study import bin_of, compare


def by_token(batch: Batch) -> tuple[np.ndarray, list[str]]:
    """Names only what is in the batch, so that classes are found one after the other."""
    found, codes = np.unique(batch.ids, return_inverse=True)
    return codes, [f"token {i}" for i in found]


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_module, "BATCH_POSITIONS", 40)


@pytest.mark.parametrize("seed", range(8))
def test_a_function_whose_classes_grow_while_the_run_is_read(write_run: Callable[..., Run], seed: int) -> None:
    run = write_run(*random_traffic(seed))
    found = study_coverage(run, [f"{__name__}:by_token"], by="position")
    compare(run, found.map("by_token"), naive(run.path, lambda r, p, t: f"token {t}"), lambda row: row["by_token"])
    crossed = naive(run.path, lambda r, p, t: (f"token {t}", bin_of(p)))
    compare(run, found.map("by_token x position"), crossed, lambda row: (row["by_token"], row["position"]))


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_the_workload(write_run: Callable[..., Run], seed: int) -> None:
    requests, spans = random_traffic(seed)
    for r in requests[::2]:
        r["labels"] = [{"axis": "entity", "name": "person", "start": 0, "end": min(3, len(r["prompt_ids"]))}]
        r["labels"] += [{"axis": "tone", "name": "calm", "start": 0, "end": 1}]
    run = write_run(requests, spans)

    def entity(request: dict, position: int, _: int) -> str:
        spans = [x for x in request["labels"] or [] if x["axis"] == "entity"]
        return "person" if any(x["start"] <= position < x["end"] for x in spans) else "other"

    assert Study(run, ["entity"]).axes[0].classes == ["person", "other"]
    compare(run, study_coverage(run, ["entity"]).map("entity"), naive(run.path, entity), lambda row: row["entity"])


@pytest.mark.parametrize("axis", ["segment", "role", "lexical", "frequency", "repeat", "position", "phase", "depth"])
def test_every_axis_counts_every_position_once_and_its_weights_cover_what_was_computed(
    write_run: Callable[..., Run], axis: str, tmp_path
) -> None:
    run = write_run(*random_traffic(7))
    study = Study(run, [axis], by="segment", model=shipped("models/probe-text/checkpoint"))
    found = study.measure()
    for m in found.maps:
        assert m.classes["positions"].sum() == found.totals["positions"]
        assert m.classes["contexts"].sum() == found.totals["contexts"]
        assert m.multiplicity["rows"].sum() == found.totals["computed"]
    files = write_weights(study, found.maps, tmp_path)
    assert len(files) == len(found.maps) == (1 if axis == "segment" else 2)


def test_families_by_lineage_join_who_reused_half_of_a_prompt(write_run: Callable[..., Run]) -> None:
    requests = [{"rid": r, "prompt_ids": [1, 2, 3, 4, ord(r)], "output_ids": [1]} for r in "abcd"]
    spans = [{"rid": "a", "start": 0, "end": 5, "phase": "prefill"}]
    for rid, reused, origin in (("b", 4, "a"), ("c", 2, "a"), ("d", 4, "b")):
        known = {"origin_rid": origin, "origin_attempt": 0}
        spans += [{"rid": rid, "start": 0, "end": reused, "status": "reused", **known}]
        spans += [{"rid": rid, "start": reused, "end": 5, "phase": "prefill"}]
    walk = walk_module.Walk(write_run(requests, spans))
    families = find_families(walk.requests, walk.traffic, seed=0)
    assert families.group[0] == families.group[1] == families.group[3]
    assert families.group[2] != families.group[0], "c reused two of five"
    assert families.count == 2
