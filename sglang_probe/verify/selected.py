"""Whether each hook point holds the rows that were selected, and no other."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_probe.run import tokens as positions
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check
from sglang_probe.verify.withheld import withheld_positions

Array = np.ndarray[Any, Any]


def held_as_selected(run: Run) -> Check:
    """Compare what every shard holds with the selection, asked again of the positions in the ledger."""
    name, claim = "selection", "every hook point holds the rows that its selection asks for, and no other"
    spans = run.spans()
    tokens = positions.expand(spans[spans["row_start"] >= 0])
    prompt_len = positions.prompt_lengths(run, tokens["rid"])
    known = np.asarray(prompt_len >= 0)
    row, position = tokens["row"].to_numpy(), tokens["position"].to_numpy()
    away = withheld_positions(run, tokens["rid"].to_numpy(), position) != ""
    covered = 0
    for hook_point in run.hook_points:
        numbers = [np.empty(0, np.int64), *(numbers for numbers, _ in run.iter_shards(hook_point))]
        held = np.isin(row, np.concatenate(numbers))
        asked = run.selected.positions(hook_point, position, prompt_len)
        wrong = known & (held != (asked & ~away))
        if wrong.any():
            bad = tokens.iloc[int(np.argmax(wrong))]
            what = "is not selected and is there" if held[int(np.argmax(wrong))] else "is selected and missing"
            violation = f"{hook_point}: the row of {bad['rid']} position {bad['position']} (row {bad['row']}) {what}"
            return Check(name, claim, covered, "rows", violation)
        covered += int(held.sum())
    unknown = int((~known).sum())
    note = f"{unknown} positions of requests whose prompt length is not in this run were not asked" if unknown else None
    return Check(name, claim, covered, "rows", note=note)
