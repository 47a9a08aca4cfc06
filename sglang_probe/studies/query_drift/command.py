"""`sglang-probe query-drift`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import Parameter, Study, option, output_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.query_drift.study import DriftResult


class QueryDrift(Study):
    """How far are decode queries from the prompt's last queries, which eviction methods score with, and does it matter?

    Cosines of pre-RoPE and post-RoPE queries, excess over what distance alone does, subspaces, change of the logits,
    how many steps the window's choice predicts, change points, negative controls, and which queries exist at all.

    RUN must have `blocks.<layer>.attn.hook_rot_q` and `hook_rot_k` of some layers; with `hook_q` the pre-RoPE queries
    are the engine's own. Needs no SGLang.

    Example: `sglang-probe query-drift runs/drift-text --window 16 --layer 3`
    """

    name = "query-drift"

    def parameters(self) -> list[Parameter]:
        """The run and the options of the measures."""
        run = typer.Argument(help="Run directory with captured queries and keys of some layers.")
        layer = "Layer to study; may be given several times. Default: all captured ones."
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            option("window", int, 32, "Last prompt positions that count as the observation window."),
            option("layer", list[int] | None, None, layer),
            option("budget", float, 0.25, "Kept share of the prompt where kept sets are judged."),
            option("processes", int | None, None, "Layers computed side by side. Default: one a CPU."),
            option("resume", bool, False, "Keep the layers that an earlier call of the same study finished."),
            output_option("Folder; default: `query-drift` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[DriftResult, Path]:
        """Measure the run."""
        from sglang_probe.attention.run_telemetry import captured_layers
        from sglang_probe.config import parse_config
        from sglang_probe.run.run import load_run
        from sglang_probe.studies.query_drift.options import DriftOptions
        from sglang_probe.studies.query_drift.study import study_drift
        from sglang_probe.studies.workers import side_by_side

        opened = load_run(given["run"])
        options = parse_config({k: given[k] for k in ("window", "budget")}, DriftOptions, where="options")
        folder = given["output"] or given["run"] / "query-drift"
        layers = given["layer"] or captured_layers(opened)
        how = {"output": folder, "resume": given["resume"]}
        how["processes"] = side_by_side(len(layers), given["processes"])
        with console.status("studying") as status:
            result = study_drift(opened, options, layers=given["layer"], **how, tell=status.update)
        return result, folder

    def page(self, result: DriftResult) -> Page:
        """The report."""
        from sglang_probe.studies.query_drift.page import drift_page

        return drift_page(result)

    def shown(self, result: DriftResult) -> Iterator[Table | str]:
        """Means by step, and horizons."""
        from sglang_probe.studies.query_drift.page import steps_table
        from sglang_probe.studies.query_drift.reading import horizon_table

        yield steps_table(result)
        yield horizon_table(result)
        for why, count in result.left_out.items():
            yield f"[yellow]left out[/]: {count} requests: {why}"
