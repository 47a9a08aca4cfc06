"""Comparisons over the positions that all of them have."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.studies.drift import Compared, in_common


def compared(positions: list[tuple[int, int, str]]) -> Compared:
    frame = pd.DataFrame(positions, columns=["index", "position", "phase"])
    l2 = (100 * frame["index"] + frame["position"]).to_numpy(np.float32)
    return Compared(frame, {"h": l2}, {"h": -l2}, {"h": 2 * l2})


def test_only_positions_that_every_comparison_has_are_left_and_values_stay_with_theirs() -> None:
    whole = compared([(0, 0, "prefill"), (0, 1, "prefill"), (1, 0, "prefill"), (1, 5, "decode")])
    cached = compared([(1, 5, "decode"), (0, 1, "prefill"), (1, 0, "decode")])
    for found in in_common([whole, cached]):
        assert sorted(found.positions.itertuples(index=False, name=None)) == [(0, 1, "prefill"), (1, 5, "decode")]
        assert sorted(found.relative_l2["h"]) == [1, 105]
        expected = 100 * found.positions["index"] + found.positions["position"]
        assert np.array_equal(found.relative_l2["h"], expected)
        assert np.array_equal(found.deviation["h"], 2 * expected)
    assert in_common([]) == []
