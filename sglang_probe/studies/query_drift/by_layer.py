"""One layer of a drift study: two documents of it in memory at a time, whatever the run holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.run.run import Run, load_run
from sglang_probe.studies.query_drift.captured import Captured, captured, mean_of_others, window_coverage
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.tables import Tables, measure
from sglang_probe.verify.frames import ReadOnce


@dataclass
class ByLayer:
    """Computes a layer: `work` of `studies.workers.compute`. Each process opens the run for itself."""

    path: Path
    rids: tuple[str, ...]
    options: DriftOptions

    def __call__(self, layer: int, advance: Callable[[], None]) -> dict[str, pd.DataFrame]:
        return layer_tables(ReadOnce(load_run(self.path)), self.rids, layer, self.options, advance=advance)


def layer_tables(
    run: Run, rids: tuple[str, ...], layer: int, o: DriftOptions, *, advance: Callable[[], None] = lambda: None
) -> dict[str, pd.DataFrame]:
    """All measures of one layer, by table. Requests with a position that has no row are left out.

    Args:
        advance: called after each request.

    Raises:
        ProbeError: fewer than two requests have the rows of all their positions.
    """
    means = {}
    for rid in rids:
        try:
            means[rid] = captured(run, rid, layer, window=o.window, sinks=o.sinks).mean_HD
        except RunDirectoryError:
            advance()
    measured = list(means)
    if len(measured) < 2:
        raise ProbeError(
            f"no two requests of {run.path} have the rows of all their positions",
            fix="record without `rows`, from the start of the server",
        )
    others = mean_of_others(means)

    def read(rid: str) -> Captured:
        c = captured(run, rid, layer, window=o.window, sinks=o.sinks)
        return replace(c, mean_HD=others[rid])

    tables = Tables()
    before = read(measured[-1])
    for rid in measured:
        c = read(rid)
        measure(tables, rid, layer, c, before, window_coverage(run, rid, c.length, o.window), o)
        before = c
        advance()
    return tables.frames()
