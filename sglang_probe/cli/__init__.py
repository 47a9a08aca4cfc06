"""The command line: what each study describes, and the commands of this folder. Nothing heavy is imported here."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from sglang_probe.cli import (
    audit,
    doctor,
    export,
    gate,
    harvest,
    live,
    manifest,
    model,
    profile,
    prove,
    remote,
    scrub,
    vector,
    verify,
    version,
    witness,
)
from sglang_probe.studies.catalogue import STUDIES

app = typer.Typer(
    name="sglang-probe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        for line in version.lines():
            typer.echo(line)
        raise typer.Exit


@app.callback()
def _main(
    asked: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of this and of what it works with.",
        ),
    ] = False,
) -> None:
    """Record what SGLang really computed: which token positions were run, which came from the prefix cache, and the
    activations of those that were run."""


app.command("harvest")(harvest.command)
sae = typer.Typer(help="Sparse autoencoders of recorded rows.", no_args_is_help=True, rich_markup_mode="markdown")
steer = typer.Typer(help="What steering vectors do.", no_args_is_help=True, rich_markup_mode="markdown")


@steer.callback()
def _steer() -> None:
    """What steering vectors do."""


for study in STUDIES:
    group, _, name = study.name.rpartition(" ")
    {"": app, "sae": sae, "steer": steer}[group].command(name)(study.command())
app.add_typer(sae, name="sae")
app.add_typer(steer, name="steer")
app.command("live")(live.command)
app.command("profile")(profile.command)
app.command("verify")(verify.command)
app.command("witness")(witness.command)
app.command("scrub")(scrub.command)
app.command("upload")(remote.upload)
app.command("download")(remote.download)
app.command("prove")(prove.command)
app.command("gate")(gate.command)
app.command("audit")(audit.command)
app.add_typer(model.app, name="model")
app.add_typer(vector.app, name="vector")
app.add_typer(export.app, name="export")
app.add_typer(manifest.app, name="manifest")
app.command("doctor")(doctor.command)


_EXTRAS = {"torch": "runs", "sglang": "engine"}
"""What `gate` does without, by the extra that brings it."""


def main() -> None:
    """Entry point. Errors meant for users are printed without a traceback; exit code 2, or 128 and the number of the
    signal after Ctrl-C, SIGTERM or SIGHUP."""
    from sglang_probe.errors import ProbeError
    from sglang_probe.harvest import signals

    try:
        with signals.as_interrupts():
            app()
    except SystemExit:  # Typer makes one of every interrupt
        if (number := signals.received()) is not None:
            sys.exit(128 + number)
        raise
    except ProbeError as e:
        from rich.console import Console

        console = Console(stderr=True)
        console.print("[bold red]error[/]", end=" ")
        console.print(str(e), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except ModuleNotFoundError as e:
        if e.name not in _EXTRAS:
            raise
        typer.echo(
            f"error {e.name} is not installed, and this command needs it\n"
            f"  to fix: pip install 'sglang-probe[{_EXTRAS[e.name]}]'",
            err=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + (signals.received() or signal.SIGINT))
