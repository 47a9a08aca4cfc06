"""`sglang-probe verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the model, to compare embeddings with; default: the hashes in the run."),
    ] = None,
    transformers: Annotated[
        int, typer.Option(help="Also recompute this many requests with `transformers`, and compare every captured row.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check that a run directory holds what it claims. Exit code 0 if all checks hold, 1 if not.

    Every check says what it covered, and the first violation is named. Needs no SGLang: it works on data copied from
    another machine.

    Example: `sglang-probe verify runs/mine --transformers 8`
    """
    import json
    from dataclasses import asdict

    from rich.console import Console

    from sglang_probe.run.run import load_run
    from sglang_probe.verify.ownership import load_embedding
    from sglang_probe.verify.verify import verify

    opened = load_run(run)
    checks = verify(opened, embedding=load_embedding(model) if model else None)
    if transformers:
        from sglang_probe.verify.reference import check_against_transformers

        checks.append(
            check_against_transformers(opened, str(model or opened.manifest["model_path"]), requests=transformers)
        )
    complete = opened.complete
    ok = complete and all(c.holds for c in checks)
    if as_json:
        typer.echo(
            json.dumps(
                {"run": str(run), "complete": complete, "ok": ok, "checks": [asdict(c) for c in checks]}, indent=2
            )
        )
        raise typer.Exit(0 if ok else 1)
    console = Console()
    for c in checks:
        mark = "[green]holds[/]" if c.holds else "[bold red]VIOLATED[/]"
        console.print(f"{mark}  [bold]{c.name}[/]: {c.claim} ({c.covered:,} {c.unit})")
        if c.violation:
            console.print(f"          {c.violation}", markup=False)
        if c.note:
            console.print(f"          note: {c.note}", markup=False)
    if not complete:
        why = opened.manifest.get("fault") or "the run was interrupted; finish it with --resume"
        console.print(f"[bold red]INCOMPLETE[/]  {why}")
    raise typer.Exit(0 if ok else 1)
