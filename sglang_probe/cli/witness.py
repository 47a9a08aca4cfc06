"""`sglang-probe witness`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    endpoint: Annotated[str, typer.Argument(help="Where the server publishes KV events, e.g. `tcp://127.0.0.1:5557`.")],
    output: Annotated[Path, typer.Option(help="Folder for `events.jsonl`, `before.prom` and `after.prom`.")],
    server: Annotated[
        str | None, typer.Option(help="Address of the server, whose `/metrics` are kept before and after.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long; default: until Ctrl-C.")] = float("inf"),
) -> None:
    """Record what a running server says of its cache, as witnesses for `sglang-probe verify --witness`.

    Start the server with `--kv-events-config '{"publisher": "zmq", "endpoint": "tcp://*:5557", "topic": "kv"}'`, and
    this before the requests come.

    Example: `sglang-probe witness tcp://127.0.0.1:5557 --server http://127.0.0.1:30000 --output seen`
    """
    from rich.console import Console

    from sglang_probe.verify.listen import for_seconds, listen

    console = Console(stderr=True)
    batches = listen(
        endpoint,
        output,
        until=for_seconds(seconds),
        metrics=server,
        ready=lambda: console.print("listening; Ctrl-C ends it", highlight=False),
    )
    typer.echo(f"{batches:,} batches of KV events in {output}")
