"""Coverage of prompts by class and by position, counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.studies.coverage.prompts import coverage_by_position, coverage_by_segment


def tokens(statuses: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "position": np.arange(len(statuses)),
            "segment": ["system"] * 4 + ["user"] * (len(statuses) - 5) + ["generated"],
            "status": [{"c": "computed", "r": "reused"}[s] for s in statuses],
        }
    )


def test_coverage_counts_prompt_positions_by_class() -> None:
    table = coverage_by_segment(tokens("rrrcrcccc")).set_index("segment")
    assert table.loc["system", ["positions", "computed", "reused", "coverage"]].tolist() == [4, 1, 3, 0.25]
    assert table.loc["user", ["positions", "computed", "reused", "coverage"]].tolist() == [4, 3, 1, 0.75]
    assert table.loc["all", "coverage"] == 0.5
    assert "generated" not in table.index


def test_coverage_by_position_uses_half_open_bins() -> None:
    table = coverage_by_position(tokens("rrrcrcccc"), width=4)
    assert table[["start", "end", "positions", "computed"]].to_numpy().tolist() == [[0, 4, 4, 1], [4, 8, 4, 3]]
