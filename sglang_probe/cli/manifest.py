"""`sglang-probe manifest`: the manifest of features and directions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The manifest of an SAE's features and of directions (`features.json`): what each is, what evidence there is "
    "that it acts, and which may act on traffic.",
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
        Path | None,
        typer.Option(
            help="A run of the model: refuse the manifest if its weights differ, or if evidence names it with another "
            "hash."
        ),
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="Folder of vectors: refuse the manifest if a direction is another one there.")
    ] = None,
) -> None:
    """Read a manifest, check it, and list its features and directions.

    Exit code 2 if it was changed without its hash, if an entry lacks what its status needs, if it is of other weights
    than those of `--run`, if evidence names `--run` with another hash, or if the vector of a direction is not the one
    in `--library`.

    Example: `sglang-probe manifest check features.json --run runs/mine --library vectors`
    """
    from sglang_probe.run.journal import sha256
    from sglang_probe.run.manifest import MANIFEST
    from sglang_probe.run.run import load_run
    from sglang_probe.run.weights import weight_hash
    from sglang_probe.steering.features import read_features
    from sglang_probe.steering.library import Library

    found = read_features(manifest)
    if run is not None:
        told = load_run(run)
        weights = (told.manifest.get("model") or {}).get("weights_sha256")
        found.check_weights(weight_hash(weights), where=str(run))
        found.check_run(told.path.name, sha256(run / MANIFEST))
    if library is not None:
        vectors = Library.open(library)
        for direction in found.directions:
            direction.check(vectors[direction.vector])
    counts = f"{len(found.features)} features and {len(found.directions)} directions"
    typer.echo(f"revision {found.revision}, sha256 {found.sha256[:16]}: {counts} of {found.model}")
    for e in found.entries:
        shown = len(found.shown(e))
        typer.echo(f"{e.key}\t{e.status}\t{shown} of {len(e.evidence)} measurements show an effect\t{e.label}")


@app.command("move")
def move(
    manifest: Manifest,
    entry: Annotated[str, typer.Argument(help="Index of the feature, or name of the direction.")],
    status: Annotated[To, typer.Argument(help="Its next status. `deployed` follows `validated` alone.")],
) -> None:
    """Give a feature or direction its next status, as the next revision of the file.

    `validated` needs causal evidence whose interval lies past zero and past its control; `deployed` a clamp too.

    Example: `sglang-probe manifest move features.json 17 validated`
    """
    from sglang_probe.steering.features import read_features, write_features

    found = read_features(manifest)
    moved = found.moved(entry, status.value)
    write_features(moved, manifest)
    typer.echo(f"{moved.entry(entry).title} is {status.value}; revision {moved.revision}, sha256 {moved.sha256[:16]}")
