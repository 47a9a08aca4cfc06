"""`sglang-probe what-if`."""

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
    from sglang_probe.studies.what_if.study import WhatIfResult


class WhatIf(Study):
    """What would have been reused with a larger cache, another policy, page size, order or router?

    SGLang's own radix tree and allocator, without a model, are driven by the recorded requests. Under the recorded
    settings the replay is put against what the engine gave, match by match, and says how many differ. Needs SGLang
    0.5.23 and token ids.

    Example: `sglang-probe what-if runs/mine --kv-tokens 2x --policy lfu`
    """

    name = "what-if"

    def parameters(self) -> list[Parameter]:
        """The run, and what is to be otherwise."""
        run = typer.Argument(help="Run directory with token ids.")
        tokens = "KV slots of the pool, or a multiple of the recorded ones such as `2x`."
        order = "`recorded`, `family` (one prefix family after the other), `sorted` (by tokens) or `shuffled`."
        router = "Replicas: `prefix:4` sends equal first 64 tokens to one of 4, `round:4` takes turns."
        return [
            Parameter("run", Parameter.KEYWORD_ONLY, annotation=Annotated[Path, run]),
            option("kv_tokens", str | None, None, tokens),
            option("policy", str | None, None, "Eviction policy of SGLang: lru, lfu, slru, fifo, ..."),
            option("page_size", int | None, None, "SGLang's page size."),
            option("order", str, "recorded", order),
            option("router", str | None, None, router),
            output_option("Folder of the results; default: `what-if` in the run directory."),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[WhatIfResult, Path]:
        """Replay."""
        from sglang_probe.studies.what_if.study import what_if

        asked = {n: given[n] for n in ("kv_tokens", "policy", "order", "router")}
        with console.status("replaying"):
            result = what_if(given["run"], page=given["page_size"], **asked)
        return result, given["output"] or given["run"] / "what-if"

    def page(self, result: WhatIfResult) -> Page:
        """The report."""
        from sglang_probe.studies.what_if.page import what_if_page

        return what_if_page(result)

    def shown(self, result: WhatIfResult) -> Iterator[Table | str]:
        """The answer and the settings."""
        from rich.markup import escape

        from sglang_probe.studies.what_if.page import answer, settings_table

        yield escape(answer(result).replace("`", ""))
        yield settings_table(result)
        yield from (f"[yellow]note[/]: {escape(note)}" for note in result.notes)
