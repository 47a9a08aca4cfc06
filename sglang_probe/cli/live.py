"""`sglang-probe live`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sglang_probe.studies.base import example_option, schema_option

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

EXAMPLE = """
# SGLANG_PROBE=probe.yaml python -m sglang.launch_server --model-path MODEL --enable-metrics
run: runs/live
live: {privacy: ids}                                    # none (default), hashes, or ids
hook_points: [hook_embed, blocks.10.hook_resid_post]    # needs `privacy: ids`; leave it out for the ledger alone
"""


def _config() -> type[EngineProbeConfig]:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

    return EngineProbeConfig


def command(
    config: Annotated[Path, typer.Argument(help="YAML of the server's recording; `--example` prints one.")],
    example: Annotated[bool, example_option(EXAMPLE)] = False,
    schema: Annotated[bool, schema_option(_config)] = False,
) -> None:
    """Check the YAML of a live server before the server is started.

    Says what would be recorded, and how to start the server. Exit code 2 if the YAML is wrong. Starts nothing.

    Example: `sglang-probe live probe.yaml`
    """
    from sglang_probe.config import load_config
    from sglang_probe.errors import ConfigError

    found = load_config(config, _config())
    if found.live is None:
        raise ConfigError(
            f"{config}: `live` is missing", fix="add `live: {}`; `sglang-probe live --example` prints a YAML"
        )
    rows = f"the ledger and rows of {', '.join(found.hook_points)}" if found.hook_points else "the ledger, no rows"
    for line in (
        f"records {rows}",
        f"writes segments to {found.run}; token ids: {'yes' if found.live.privacy == 'ids' else 'no'}",
        f"start: SGLANG_PROBE={config} python -m sglang.launch_server --model-path MODEL --enable-metrics",
    ):
        typer.echo(line)
