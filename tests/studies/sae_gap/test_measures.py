"""Numbers by row: what is predicted, what is repeated, and which rows may be read at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.likelihood import Unembedding
from sglang_probe.studies.sae_gap.measures import predictions, repetition, where_of

UNEMBEDDING = Unembedding(torch.ones(2), 1e-6, torch.tensor([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]))


class Run:
    """Rows of a last layer by number, and a frame of tokens."""

    path = "run"
    manifest = {"model_config": {"num_hidden_layers": 3}}

    def __init__(self, rows: torch.Tensor, marked: list[Any] | None = None) -> None:
        self._rows, self._marked = rows, marked

    def rows(self, hook_point: str, which: np.ndarray) -> torch.Tensor:
        assert hook_point == "blocks.2.hook_resid_post"
        return self._rows[torch.from_numpy(which)]

    def tokens(self) -> pd.DataFrame:
        n = len(self._rows)
        told = {"rid": "r", "position": range(n), "row": range(n), "phase": "prefill", "intervention": self._marked}
        return pd.DataFrame(told)

    def spans(self) -> pd.DataFrame:
        told = self.tokens().assign(attempt=0, status="computed", forward_id=0, row_step=1)
        told = told.assign(origin_rid=None, origin_attempt=0, origin_start=-1, end=told["position"] + 1)
        return told.rename(columns={"position": "start", "row": "row_start"})

    def requests(self) -> pd.DataFrame:
        return pd.DataFrame({"rid": ["r"], "index": [0]})

    def requests_table(self, columns: list[str]) -> pa.Table:
        return pa.Table.from_pandas(self.requests()[columns])


def test_predictions_are_those_of_the_rows_and_the_divergence_is_from_the_clean_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    clean, other = (torch.randn(6, 2, generator=rng) for _ in range(2))
    where, elsewhere = np.array([[0, 1, 2], [3, 4, 5]]), np.array([[5, 4, 3], [2, 1, 0]])
    ids = np.array([[0, 1, 2], [2, 2, 0]])
    runs: Any = {"sae": (Run(other), elsewhere)}
    found = predictions(Run(clean), where, ids, runs, UNEMBEDDING)  # type: ignore[arg-type]
    p = torch.distributions.Categorical(logits=UNEMBEDDING.logits(clean))
    q = torch.distributions.Categorical(logits=UNEMBEDDING.logits(other[[5, 4, 3, 2, 1, 0]]))
    assert np.allclose(found["entropy"], p.entropy(), atol=1e-5)
    assert np.allclose(found["kl_sae"], torch.distributions.kl_divergence(p, q), atol=1e-5)
    known, following = [0, 1, 3, 4], torch.tensor([1, 2, 0, 2, 0, 0])
    for name, d in (("nll", p), ("nll_sae", q)):
        assert np.allclose(found[name].to_numpy()[known], -d.log_prob(following).numpy()[known], atol=1e-5)
    assert found[["nll", "nll_sae"]].isna().all(axis=1).tolist() == [False, False, True] * 2
    same = predictions(Run(clean), where, ids, {"sae": (Run(clean), where)}, UNEMBEDDING)  # type: ignore
    assert float(same["kl_sae"].abs().max()) < 1e-6


def test_rows_under_an_intervention_are_no_plain_rows_and_plain_ones_are_not_replaced() -> None:
    rows = torch.zeros(4, 2)
    for marked, asked, fine in (
        ([None, None, "a", "a"], False, False),
        ([None, None, "a", "a"], True, True),
        ([None, "a", None, "a"], True, False),
        ([None, "a", None, None], False, True),
    ):
        run: Any = Run(rows, marked)
        if fine:
            assert where_of(run, 2, 4, intervened=asked)[1].tolist() == [[2, 3]]
        else:
            with pytest.raises(ProbeError, match="intervened on"):
                where_of(run, 2, 4, intervened=asked)


def test_repetition_is_of_grams_that_were_there_before() -> None:
    assert repetition(np.array([1, 2, 1, 2, 1, 2]), 2) == pytest.approx(3 / 5)
    assert repetition(np.arange(20), 8) == 0
    assert repetition(np.zeros(20, dtype=int), 8) == pytest.approx(12 / 13)
    assert repetition(np.arange(3), 8) == 0
