"""`sglang-probe why`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import Parameter, Study, option, output_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.why.study import WhyResult


class Why(Study):
    """Why was this prompt not reused? Every computed token has one cause, and the causes sum exactly.

    Never seen, diverged at position p from the nearest earlier request (and what differs there: a time, a changed
    stretch, another order), evicted, page rounding, not yet published, another namespace (salt, key, adapter), the last
    token, log-probabilities, retraction. With each what to do, and how many tokens it would save. `sglang-probe verify`
    asks the sums. Needs token ids, or the keyed hashes of `live: {privacy: hashes}`: then positions are told, no text.

    Example: `sglang-probe why runs/mine --by family`
    """

    name = "why"

    def parameters(self) -> list[Parameter]:
        """The run, and perhaps one request."""
        run = typer.Argument(help="Run directory, a segment of a live recording, or the folder of its segments.")
        rid = typer.Argument(help="One request; default: all.")
        optional = Annotated[str | None, rid]
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            Parameter("rid", Parameter.KEYWORD_ONLY, annotation=optional, default=None),
            option(
                "by",
                str,
                "family",
                "What requests are grouped by: `family`, `rid`, a label that they carry such as `session`, or an axis.",
            ),
            option("model", Path | None, None, "Folder of the tokenizer; default: the one that the run names."),
            output_option("Folder of the results; default: `why` in the run directory, of one request a folder in it."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[WhyResult, Path]:
        """Find the causes."""
        from sglang_probe.studies.why.study import why

        with console.status("finding causes"):
            result = why(given["run"], rid=given["rid"], by=given["by"], model=given["model"])
        folder = given["run"] / "why"
        if given["rid"] is not None:
            folder = folder / re.sub(r"[^\w.-]", "_", given["rid"]).lstrip(".")[:80]
        return result, given["output"] or folder

    def page(self, result: WhyResult) -> Page:
        """The report."""
        from sglang_probe.studies.why.page import why_page

        return why_page(result)

    def shown(self, result: WhyResult) -> Iterator[Table | str]:
        """The answer, causes and remedies."""
        from rich.markup import escape

        from sglang_probe.studies.why.page import answer, causes_table, pieces_table

        yield escape(answer(result).replace("`", "").replace("**", ""))
        yield causes_table(result)
        if result.rid is not None:
            yield pieces_table(result)
        for r in result.remedies.itertuples():
            yield escape(f"{r.tokens:,} tokens, {r.what}: {r.remedy}. Example: {r.example}.".replace("`", ""))
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
