"""What is recorded for a gap: which texts, and what each request asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError, WorkloadError
from sglang_probe.sae.folder import write_sae
from sglang_probe.studies.phase.study import DECODED, HUMAN
from sglang_probe.studies.sae_gap import runs
from sglang_probe.studies.sae_gap.config import SaeGapConfig
from sglang_probe.workload.request import Request, SegmentSpan
from tests.sae.small import random_sae

P, C = 4, 3


@dataclass(frozen=True)
class Workload:
    requests: tuple[Request, ...]


def request(i: int, length: int = P + C) -> Request:
    ids = tuple(range(10 * i, 10 * i + length))
    return Request(i, f"r{i}", ids, (SegmentSpan("document", 0, length),), f"document {i}")


def config(**more: Any) -> SaeGapConfig:
    return SaeGapConfig.model_validate({"sae": "sae", "prompt_tokens": P, "continuation_tokens": C, **more})


def texts(monkeypatch: pytest.MonkeyPatch, requests: list[Request], known: list[str], **more: Any) -> list[str]:
    run = SimpleNamespace(requests=lambda: pd.DataFrame({"family": known}))
    monkeypatch.setattr(runs, "load_run", lambda _path: run)
    prepared: Any = SimpleNamespace(workload=Workload(tuple(requests)))
    found: Any = runs._texts(prepared, config(apart_from=["trained"], **more))
    assert [r.index for r in found.requests] == list(range(len(found.requests)))
    return [r.rid for r in found.requests]


def test_documents_of_the_training_and_short_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [request(0), request(1, P + C - 1), request(2), request(3), request(4)]
    assert texts(monkeypatch, given, ["document 2"]) == ["r0", "r3", "r4"]
    assert texts(monkeypatch, given, ["document 2"], most_texts=2) == ["r0", "r3"]
    with pytest.raises(WorkloadError, match="3 of 4 texts are of documents of `apart_from`"):
        texts(monkeypatch, given, ["document 0", "document 2", "document 3"])


def test_each_request_asks_for_its_continuation_and_has_an_error_of_its_own() -> None:
    outputs = pd.DataFrame({"index": [0, 1], "output_ids": [[7, 8, 9, 1], [6, 5, 4, 1]]})
    clean: Any = {DECODED: [SimpleNamespace(requests=lambda: outputs)]}
    given = [request(0), request(1)]
    for kind, where in (
        (HUMAN, {"phases": ("prefill",), "prompt_window": (P, None)}),
        (DECODED, {"phases": ("decode",)}),
    ):
        for variant in runs.VARIANTS:
            asked = runs._asking(kind, variant, given, config(), clean)
            for i, r in enumerate(asked):
                (step,) = r.ask.steer or ()
                assert step.model_dump(exclude_defaults=True) == {
                    "vector": "sae" if variant == "random" else variant,
                    "op": "splice",
                    **where,
                    **({"random_error": i} if variant == "random" else {}),
                }
                assert r.ask.force == (tuple(outputs["output_ids"][i]) if kind == DECODED else None)


def test_the_mean_row_takes_the_place_of_any_row() -> None:
    row = torch.tensor([1.0, -2.0, 3.0])
    sae = runs._constant(row, "blocks.0.hook_resid_post")
    assert torch.equal(sae.reconstruct(torch.randn(5, 3)), row.expand(5, 3))


def test_another_library_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "formal.json").write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"it has formal.json"):
        runs._library(config(), None, tmp_path)  # type: ignore[arg-type]
    assert (tmp_path / "formal.json").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"hook_points": ["blocks.0.hook_resid_post"]}, "follow from the SAE"),
        ({"steer": {"library": "vectors"}}, "`steer` has no meaning"),
        ({"spliced": ["human", "human"]}, "names one twice"),
        ({"spliced": ["decode"]}, "decoded"),
        ({"sampling": {"stop": "x"}}, "every output is as long as"),
        ({"rows": {"window": 8}}, "reads all positions"),
    ],
)
def test_what_has_no_meaning_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**more)


def test_an_sae_that_does_not_say_where_its_rows_come_from_needs_to_be_told(tmp_path: Path) -> None:
    write_sae(random_sae("standard"), tmp_path / "sae")
    with pytest.raises(ConfigError, match="does not say where"):
        runs.sae_of(config(sae=str(tmp_path / "sae")))
    point = "blocks.1.hook_resid_post"
    assert runs.sae_of(config(sae=str(tmp_path / "sae"), hook_point=point)).hook_point == point
