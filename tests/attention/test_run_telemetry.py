"""Telemetry of a run: regions part the keys. Its numbers: tests/end_to_end/test_queries.py."""

from __future__ import annotations

import numpy as np

from sglang_probe.attention.run_telemetry import REGIONS, TelemetryOptions, regions_of


def test_regions_part_the_keys() -> None:
    segments = np.array(["system"] * 5 + ["user"] * 5 + ["generated"] * 2)
    found = regions_of(segments, 10, TelemetryOptions(sinks=2, window=3))
    names = [REGIONS[i] for i in found]
    assert names == ["sinks"] * 2 + ["system"] * 3 + ["prompt"] * 2 + ["window"] * 3 + ["generated"] * 2


def test_of_a_short_prompt_the_window_is_what_is_not_sinks() -> None:
    found = regions_of(np.array(["system"] * 3 + ["generated"]), 3, TelemetryOptions(sinks=1, window=8))
    assert [REGIONS[i] for i in found] == ["sinks", "window", "window", "generated"]
