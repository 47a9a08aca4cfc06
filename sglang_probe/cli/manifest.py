"""`sglang-probe manifest`: the manifest of an SAE's features."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The manifest of an SAE's features (`features.json`): what each is, what evidence there is that it acts, and "
    "which may act on traffic.",
    no_args_is_help=True,
)


class To(StrEnum):
    hypothesis = "hypothesis"
    validated = "validated"
    deployed = "deployed"
    retired = "retired"


Manifest = Annotated[Path, typer.Argument(help="The file `features.json`.")]


@app.command("check")
def check(
    manifest: Manifest,
    run: Annotated[
        Path | None, typer.Option(help="A run of the model: refuse the manifest if its weights differ.")
    ] = None,
) -> None:
    """Read a manifest, check it, and list its features.

    Exit code 2 if it was changed without its hash, if a feature lacks what its status needs, or if it is of other
    weights than those of `--run`.

    Example: `sglang-probe manifest check features.json --run runs/mine`
    """
    from sglang_probe.run.run import load_run
    from sglang_probe.steering.features import read_features
    from sglang_probe.steering.library import weight_hash

    found = read_features(manifest)
    if run is not None:
        weights = (load_run(run).manifest.get("model") or {}).get("weights_sha256")
        found.check_weights(weight_hash(weights), where=str(run))
    typer.echo(
        f"revision {found.revision}, sha256 {found.sha256[:16]}: {len(found.features)} features of {found.model}"
    )
    for f in found.features:
        shown = sum(e.shows_an_effect for e in f.evidence)
        typer.echo(f"{f.index}\t{f.status}\t{shown} of {len(f.evidence)} measurements show an effect\t{f.label}")


@app.command("move")
def move(
    manifest: Manifest,
    index: Annotated[int, typer.Argument(help="Index of the feature.")],
    status: Annotated[To, typer.Argument(help="Its next status. `deployed` follows `validated` alone.")],
) -> None:
    """Give a feature its next status, as the next revision of the file.

    `validated` needs causal evidence whose interval lies past zero and past its control; `deployed` a clamp too.

    Example: `sglang-probe manifest move features.json 17 validated`
    """
    from sglang_probe.steering.features import read_features, write_features

    found = read_features(manifest)
    moved = found.moved(index, status.value)
    write_features(moved, manifest)
    typer.echo(f"feature {index} is {status.value}; revision {moved.revision}, sha256 {moved.sha256[:16]}")
