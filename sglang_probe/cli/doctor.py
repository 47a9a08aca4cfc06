"""`sglang-probe doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    write: Annotated[
        bool, typer.Option(help="Draft an inventory for the installed release from the newest one, to be reviewed.")
    ] = False,
) -> None:
    """Show the installed SGLang, and whether every place in it that the probe touches is as it was reviewed.

    Each place is fine, changed or missing. Exit code 0 if all are fine, 1 if not.
    """
    from rich.console import Console
    from rich.table import Table

    from sglang_probe.engine.hooks import inventory
    from sglang_probe.paths import shipped

    console = Console()
    version = inventory.installed_version()
    known = inventory.known_versions()
    console.print(f"SGLang [bold]{version}[/]; reviewed releases: {', '.join(known)}")
    console.print(f"platform: {_platform()}", soft_wrap=True)
    if write:
        path = inventory.draft(Path(shipped("patches")), version)
        console.print(f"drafted [bold]{path}[/]: review every target before you rely on it", soft_wrap=True)
    table = Table(box=None, padding=(0, 1))
    for column in ("state", "how", "feature", "target (under sglang.srt)"):
        table.add_column(column, overflow="fold")
    reference = inventory.nearest_inventory(version)
    if reference.sglang != version:
        console.print(
            f"[bold yellow]{version} has not been reviewed[/]; compared with the inventory of {reference.sglang}"
        )
    findings = list(inventory.examine(reference))
    style = {"fine": "green", "changed": "bold yellow", "missing": "bold red"}
    for f in findings:
        name = f.target.target.removeprefix("sglang.srt.")
        if f.state != "fine":
            name += f"\n  reviewed {f.target.fingerprint}, installed {f.found or 'nothing'}"
        table.add_row(f"[{style[f.state]}]{f.state}[/]", f.target.hook, f.target.feature, name)
    console.print(table)
    bad = sum(f.state != "fine" for f in findings)
    console.print(f"{len(findings)} targets, {bad} not as reviewed")
    raise typer.Exit(1 if bad or reference.sglang != version else 0)


def _platform() -> str:
    from sglang_probe.engine.platform.environment import DEVICE, cpu_chosen, platform_facts

    facts = platform_facts()
    if facts["device"] == "accelerator":
        return f"an accelerator is present, SGLang's own platform is used; {DEVICE}=cpu leaves it alone"
    why = f"{DEVICE}=cpu" if cpu_chosen() else "no accelerator found"
    how = (
        "bf16 by this CPU" if facts["bf16_products"] == "bf16" else "bf16 in fp32, because this CPU has no bf16 kernels"
    )
    return f"{why}, the CPU reference platform is used; it multiplies {how}"
