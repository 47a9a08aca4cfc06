"""`sglang-probe verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from sglang_probe.run.run import Run
    from sglang_probe.steering.library import Vector
    from sglang_probe.verify.check import Check


def command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model, to compare embeddings with; default: the hashes in the run, and without them "
            "the folder that its manifest names, if it exists."
        ),
    ] = None,
    transformers: Annotated[
        int, typer.Option(help="Also recompute this many requests with `transformers`, and compare every captured row.")
    ] = 0,
    library: Annotated[
        Path | None,
        typer.Option(
            help="Library of the vectors that requests were steered by, so that `--transformers` computes them again "
            "under their interventions. Without it they are left out."
        ),
    ] = None,
    witness: Annotated[
        list[str] | None,
        typer.Option(
            help="What others saw of the same server, several times: a JSONL of answers or of KV events, "
            "`before=FILE` and `after=FILE` with scrapes of /metrics, or a log of SGLang's kv_canary."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check that a run directory holds what it claims. Exit code 0 if all checks hold, 1 if not.

    Every check says what it covered, and the first violation is named. Exit code 1 as well if the run is incomplete,
    or damaged so that it cannot be read; 2 if it is no run directory. Needs no SGLang: it works on data copied from
    another machine.

    Example: `sglang-probe verify runs/mine --transformers 8`
    """
    from rich.console import Console

    from sglang_probe.errors import ProbeError

    console, errors = Console(), Console(stderr=True)
    try:
        with errors.status("reading") as status:
            checks, complete, why = _checked(run, model, transformers, library, witness or (), _shown(status.update))
    except ProbeError as e:
        if as_json:
            _print_json(run, None, False, [], error=e.message, fix=e.fix)
            raise typer.Exit(2) from e
        raise
    ok = complete and all(c.holds for c in checks)
    if as_json:
        _print_json(run, complete, ok, checks)
        raise typer.Exit(0 if ok else 1)
    for c in checks:
        mark = "[green]holds[/]" if c.holds else "[bold red]VIOLATED[/]"
        console.print(f"{mark}  [bold]{c.name}[/]:", f"{c.claim} ({c.covered:,} {c.unit})", highlight=False)
        if c.violation:
            console.print(f"          {c.violation}", markup=False)
        if c.note:
            console.print(f"          note: {c.note}", markup=False)
    if not complete and why:
        console.print("[bold red]INCOMPLETE[/] ", end="")
        console.print(why, markup=False)
    raise typer.Exit(0 if ok else 1)


def _checked(
    path: Path,
    model: Path | None,
    transformers: int,
    library: Path | None,
    witness: Sequence[str],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Check], bool, str | None]:
    """Checks; whether the run is complete, and if not why. A run that cannot be opened is one violated check.

    Raises:
        ProbeError: the folder is no run directory, `model` has no embedding, `library` or a witness cannot be read.
    """
    from sglang_probe.errors import ConfigError, RunDirectoryError
    from sglang_probe.run.run import load_run
    from sglang_probe.steering.library import Library
    from sglang_probe.verify.check import Check
    from sglang_probe.verify.files import readable
    from sglang_probe.verify.verify import verify
    from sglang_probe.verify.witness import ask, read_witnesses

    witnesses = read_witnesses(witness)
    vectors: list[Vector] = []
    if library is not None:
        if not transformers:
            raise ConfigError("`--library` has no effect alone", fix="give `--transformers 8` too")
        vectors = list(Library.open(library).values())
    missing = readable(path)
    claim = "the run directory can be opened"
    if missing is not None:
        return [Check("files", claim, 0, "files", missing)], False, None
    try:
        opened = load_run(path)
        for key in ("status", "hook_points"):
            opened.manifest[key]  # or it is said that it is not there
    except RunDirectoryError as e:
        return [Check("files", claim, 0, "files", e.message)], False, None
    checks = verify(opened, embedding=_embedding(opened, model), progress=progress)
    if transformers and all(c.holds for c in checks):
        from sglang_probe.verify.reference import check_against_transformers

        told = model or opened.manifest["model_path"]
        checks.append(check_against_transformers(opened, str(told), requests=transformers, vectors=vectors))
    if all(c.holds for c in checks):
        checks += ask(opened, witnesses)
    why = opened.manifest.get("fault") or "the run was interrupted; finish it with --resume"
    return checks, opened.complete, str(why)


def _embedding(run: Run, model: Path | None) -> torch.Tensor | None:
    """The matrix to compare rows with; None: the hashes of the run, or nothing."""
    from sglang_probe.errors import ConfigError
    from sglang_probe.run.hook_points import EMBED
    from sglang_probe.verify.ownership import ORACLE_FILE, load_embedding

    if EMBED not in run.hook_points:
        return None
    if model is not None:
        found = load_embedding(model)
        if found is None:
            raise ConfigError(f"{model} has no embedding matrix in safetensors files", fix="give the model's folder")
        return found
    named = run.manifest.get("model_path")
    if (run.path / ORACLE_FILE).exists() or not isinstance(named, str) or not Path(named).is_dir():
        return None
    return load_embedding(named)


def _shown(update: Callable[[str], Any]) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, of: int) -> None:
        update(what if of < 2 else f"{what} ({done + 1} of {of})")

    return progress


def _print_json(run: Path, complete: bool | None, ok: bool, checks: list[Check], **more: Any) -> None:
    import json
    from dataclasses import asdict

    told = {"run": str(run), "complete": complete, "ok": ok, "checks": [asdict(c) for c in checks], **more}
    typer.echo(json.dumps(told, indent=2))
