"""`sglang-probe trace`."""

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
    from sglang_probe.studies.trace.direct import DirectResult
    from sglang_probe.studies.trace.study import TraceResult


class Trace(Study):
    """What did one prediction use? Attribution to features and errors of SAEs, and the ablations that check it.

    The recorded prompt is computed again by `transformers` in float32. Nodes are the features of the given SAEs that
    fire at each position, and the errors beside them; the metric is the logit of a target minus that of a foil. The
    strongest nodes are then ablated for real, beside matched random ones, and predicted stands against true: the word
    circuit is used only where that check passes. `--direct` runs no model: what features write straight to the logits.

    Example: `sglang-probe trace runs/mine --sae saes/block10 --sae saes/block20 --rid r000003 --foil ' is'`
    """

    name = "trace"

    def parameters(self) -> list[Parameter]:
        """The run, the SAEs, and which prediction."""
        run = typer.Argument(help="Run directory with the request and its token ids.")
        sae = typer.Option(help="Folder of an SAE of `blocks.N.hook_resid_post`; once for each layer.")
        base = typer.Option(help="What an ablated node is set to: `zero`, or its `mean` over recorded rows.")
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            Parameter("sae", Parameter.KEYWORD_ONLY, annotation=Annotated[list[Path], sae]),
            option("rid", str | None, None, "Request; default: the first."),
            option("position", int | None, None, "Position whose prediction is traced; default: the prompt's last."),
            option("target", str | None, None, "What is predicted: text of a token, or `#ID`; default: the next one."),
            option("foil", str | None, None, "What it is compared with; default: the likeliest other token."),
            option("baseline", str, "zero", base),
            option("steps", int, 0, "Points of integrated gradients; 0: the gradient at the prompt, which needs none."),
            option("top", int, 10, "Nodes that are ablated; twice as many are drawn."),
            option("random", int, 5, "Matched random nodes for each of them."),
            option("direct", bool, False, "Direct logit attribution from recorded rows instead; no model is run."),
            option("rows", Path | None, None, "Run whose rows give names and means; default: the run itself."),
            option("most", int, 20_000, "Rows to read for that, whole requests drawn at random."),
            option("first_positions", int, 1, "Positions at the start of the prompt that have no nodes."),
            option("norm_multiple", float, 10.0, "Nor have rows of more than so many times the median norm; 0: all."),
            option("model", Path | None, None, "Folder of the checkpoint; default: the one that the run names."),
            option("seed", int, 0, "Of all draws."),
            output_option("Folder of the results; default: `trace` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[TraceResult | DirectResult, Path]:
        """Trace."""
        from sglang_probe.errors import ConfigError
        from sglang_probe.sae.evaluation import Sinks

        if given["first_positions"] < 0 or given["norm_multiple"] < 0 or given["most"] < 1:
            raise ConfigError("`--first-positions` and `--norm-multiple` are at least 0, and `--most` at least 1")
        if given["top"] < 1 or given["random"] < 1 or not 0 <= given["steps"] <= 1000:
            raise ConfigError("`--top` and `--random` are at least 1, and `--steps` lies between 0 and 1000")
        if given["baseline"] not in ("zero", "mean"):
            raise ConfigError(f"`--baseline {given['baseline']}` is not known", fix="`zero` or `mean`")
        sinks = Sinks(given["first_positions"], given["norm_multiple"] or None)
        names = ("rid", "position", "target", "foil", "rows", "most", "model", "seed")
        how = {n: given[n] for n in names} | {"sinks": sinks}
        folder = given["output"] or given["run"] / ("trace-direct" if given["direct"] else "trace")
        if given["direct"]:
            from sglang_probe.studies.trace.direct import direct

            with console.status("reading rows"):
                return direct(given["run"], given["sae"], **how), folder
        from sglang_probe.studies.trace.study import trace

        how |= {n: given[n] for n in ("baseline", "steps", "top", "random")}
        with console.status("tracing") as status:
            return trace(given["run"], given["sae"], **how, tell=status.update), folder

    def page(self, result: TraceResult | DirectResult) -> Page:
        """The report."""
        from sglang_probe.studies.trace.direct import DirectResult
        from sglang_probe.studies.trace.page import direct_page, trace_page

        return direct_page(result) if isinstance(result, DirectResult) else trace_page(result)

    def shown(self, result: TraceResult | DirectResult) -> Iterator[Table | str]:
        """The answer, and the ablations."""
        from rich.markup import escape

        from sglang_probe.studies.trace.direct import DirectResult
        from sglang_probe.studies.trace.page import ablation_table, answer, direct_answer, site_table

        if isinstance(result, DirectResult):
            yield escape(direct_answer(result).replace("`", ""))
        else:
            yield escape(answer(result).replace("`", ""))
            yield ablation_table(result)
            yield site_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
