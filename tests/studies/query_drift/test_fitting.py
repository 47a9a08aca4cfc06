"""Which requests a drift study takes."""

from __future__ import annotations

import json

import pandas as pd

from sglang_probe.attention.from_run import departs
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.study import DEPARTS, TOO_FEW, TOO_SHORT, _fitting

MOVED = json.dumps({"custom_params": {"probe": {"positions": {"from": 4, "to": 0}}}})


def test_requests_that_did_not_attend_to_a_whole_cache_in_order_are_left_out_and_counted() -> None:
    requests = pd.DataFrame(
        {
            "rid": ["plain", "evicted", "moved", "short", "few", "live"],
            "prompt_len": [500, 500, 500, 3, 500, 500],
            "output_len": [100, 100, 100, 100, 2, 100],
            "evict": [None, "snapkv", None, None, None, None],
            "sampling_params": ["{}", "{}", MOVED, "{}", "{}", None],
        }
    )
    fitting, left_out = _fitting(requests, DriftOptions())
    assert list(fitting["rid"]) == ["plain", "live"]
    assert left_out == {DEPARTS: 2, TOO_SHORT: 1, TOO_FEW: 1}
    assert departs(requests.loc[1]) == "has a kept set"
    assert departs(requests.loc[2]) == "has RoPE positions of its own"
