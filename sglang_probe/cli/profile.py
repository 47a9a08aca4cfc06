"""`sglang-probe profile`: what is usual, as a folder that a server's monitor judges by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories that say what is usual, or segments of a server.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    hook_point: Annotated[
        str | None, typer.Option(help="Whose recorded rows are read; default: that of the SAE.")
    ] = None,
    sae: Annotated[Path | None, typer.Option(help="Folder of an SAE of that hook point.")] = None,
    feature: Annotated[list[int] | None, typer.Option(help="A latent of the SAE to watch; may be repeated.")] = None,
    library: Annotated[Path | None, typer.Option(help="Folder of vectors.")] = None,
    vector: Annotated[
        list[str] | None, typer.Option(help="A probe or direction of it to watch; may be repeated. Default: all.")
    ] = None,
    every: Annotated[int, typer.Option(help="Decode steps from one row that is read to the next.")] = 16,
    rows: Annotated[
        int | None, typer.Option(help="Compare the first so many rows of each request, and leave out shorter ones.")
    ] = None,
    monitored: Annotated[
        bool, typer.Option(help="Read what a server's `monitor` recorded, by its own rule, in place of rows.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace a profile that is there.")] = False,
) -> None:
    """Make the reference profile by which a live server's `monitor` judges requests.

    Take runs of your own traffic. Half of their families of requests are fitted to, and the other half is what scores
    are ranked against. The profile remembers what is read, how rows are sampled, and of which weights it is: a server
    reads by the same rule, and refuses it for another model.

    Example: `sglang-probe profile runs/last-week --sae my-sae --feature 17 --output profiles/last-week`
    """
    from sglang_probe.errors import ConfigError
    from sglang_probe.monitor.make import from_monitored, from_rows
    from sglang_probe.monitor.stored import write_profile
    from sglang_probe.run.run import load_run

    for name, value in (("every", every), ("rows", rows)):
        if value is not None and value < 1:
            raise ConfigError(f"`--{name}` is at least 1 (got {value})")
    opened = [load_run(path) for path in runs]
    if monitored:
        if hook_point or sae or feature or vector or every != 16:
            raise ConfigError("`--monitored` reads what was read: it takes --rows and --library alone")
        found = from_monitored(opened, rows=rows, library=library)
    else:
        found = from_rows(
            opened,
            hook_point,
            sae=sae,
            features=feature or (),
            library=library,
            vectors=vector or (),
            every=every,
            rows=rows,
        )
    write_profile(output, found, overwrite=overwrite)
    n, k = len(found.profile.reference), len(found.profile.statistics)
    typer.echo(f"{output}: {k} statistics of {', '.join(found.watch.columns)}; {n} requests to rank against")
    typer.echo(f"single requests can alarm at a share of {k / (n + 1):.2g} or more (`share` of the server's monitor)")
