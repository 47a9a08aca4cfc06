"""The command line. One file per command; each is thin and imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer

from sglang_probe.cli import doctor, harvest, verify
from sglang_probe.studies.ab import command as ab
from sglang_probe.studies.ab import lossless_command as lossless
from sglang_probe.studies.coverage import command as coverage
from sglang_probe.studies.evict import command as evict
from sglang_probe.studies.factorial import command as factorial
from sglang_probe.studies.phase import command as phase
from sglang_probe.studies.query_drift import command as query_drift

app = typer.Typer(
    name="sglang-probe",
    help="Exact accounting of what SGLang computed: which tokens of a harvest were run, and which came from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command("harvest")(harvest.command)
app.command("ab")(ab.command)
app.command("coverage")(coverage.command)
app.command("lossless")(lossless.command)
app.command("phase")(phase.command)
app.command("query-drift")(query_drift.command)
app.command("factorial")(factorial.command)
app.command("evict")(evict.command)
app.command("verify")(verify.command)
app.command("doctor")(doctor.command)


def main() -> None:
    """Entry point. Errors meant for users are printed without a traceback; exit code 2, or 130 after Ctrl-C."""
    from sglang_probe.errors import ProbeError

    try:
        app()
    except ProbeError as e:
        from rich.console import Console

        console = Console(stderr=True)
        console.print("[bold red]error[/]", end=" ")
        console.print(str(e), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
