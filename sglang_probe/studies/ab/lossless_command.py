"""`sglang-probe lossless`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.studies.base import EXPERIMENT, Parameter, Study, opened, option, output_option, schema_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.run.run import Run
    from sglang_probe.studies.ab.lossless import LosslessResult

FOLDER = "lossless"


class Lossless(Study):
    """Does a harvest with the prefix cache on lose anything, once each reused position gets the row of its origin?

    Reads an experiment that `sglang-probe ab` has recorded, with an arm that reuses positions and one that reuses none.
    Shows how many positions have a row, how much time the cache saved, and how far gathered rows are from computed
    ones, compared with how far a run without cache is from itself. An arm with other prefill chunks is a floor too.

    The YAML is that of `ab`; the result is in the folder `lossless` of the experiment. Exit code 1 if a position of the
    cached arm has no row.

    Example: `sglang-probe lossless experiments/lossless/experiment.yaml`
    """

    name = "lossless"

    def parameters(self) -> list[Parameter]:
        """The experiment."""
        from sglang_probe.studies.ab.command import Ab

        return [
            EXPERIMENT,
            output_option("Folder of the experiment; default: `<output>/<name>` of the YAML."),
            option("schema", bool, False, schema_option(Ab().config)),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[LosslessResult, Path]:
        """Read the arms and compare them."""
        from sglang_probe.run.run import load_run
        from sglang_probe.studies.ab.command import Ab
        from sglang_probe.studies.ab.lossless import study_lossless
        from sglang_probe.studies.ab.plan import plan

        config, name, folder = opened(given, Ab().config())
        arms: dict[str, list[Run]] = {arm: [] for arm in config.arms}
        for p in sorted(plan(config), key=lambda p: p.replicate):
            arms[p.arm].append(load_run(folder / p.name))
        with console.status("comparing rows"):
            return study_lossless(arms, name), folder / FOLDER

    def page(self, result: LosslessResult) -> Page:
        """The report."""
        from sglang_probe.studies.ab.lossless_page import lossless_page

        return lossless_page(result)

    def shown(self, result: LosslessResult) -> Iterator[Table | str]:
        """Coverage, distances at the deepest hook point, and the speed-up."""
        from sglang_probe.studies.ab.lossless_page import coverage_table, distance_tables

        yield coverage_table(result)
        yield from distance_tables(result)
        yield "faster than without cache, by replicate: " + ", ".join(f"{s:.2f} x" for s in result.speedup)
