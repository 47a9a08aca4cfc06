"""`sglang-probe doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.engine.hooks.inventory import Finding, Inventory

_STYLE = {"fine": "green", "changed": "bold yellow", "missing": "bold red"}
_EVERYTHING = "accounting"
"""The feature that every recording needs."""


def command(
    write: Annotated[
        bool, typer.Option(help="Draft an inventory for that release from the nearest one, to be reviewed.")
    ] = False,
    wheel: Annotated[
        Path | None,
        typer.Option(help="Ask a wheel of SGLang that is not installed; `pip download sglang==VERSION --no-deps`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Show whether every place in SGLang that the probe touches or relies on is as it was reviewed.

    Asks the installed SGLang, or a wheel (`--wheel`), whose source is read from the file: nothing of it is imported or
    installed. Each place is fine, changed or missing; a feature with one that is not fine is refused on that release. A
    release that was not reviewed is compared with the reviewed one from which it differs least.

    Exit code 0 if the release was reviewed and all places are fine, 1 if not, 2 if there is nothing to ask.

    Example: `sglang-probe doctor --wheel sglang-0.5.24-cp311-cp311-manylinux_2_34_x86_64.whl`
    """
    import json

    from rich.console import Console

    from sglang_probe.engine.hooks import fingerprint, inventory
    from sglang_probe.paths import shipped

    source: fingerprint.Source = fingerprint.INSTALLED
    version = ""
    if wheel is not None:
        source = asked = fingerprint.Wheel(wheel)
        version = asked.version
    version = version or inventory.installed_version()
    reference = inventory.nearest_inventory(version, source)
    findings = list(inventory.examine(reference, source=source))
    console = Console(stderr=as_json)
    if write:
        path = inventory.draft(Path(shipped("patches")), version, source)
        console.print(f"drafted [bold]{path}[/]: review every target before you rely on it", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(_told(version, wheel, reference, findings), indent=2))
    else:
        known = ", ".join(inventory.known_versions())
        console.print(f"SGLang [bold]{version}[/]{_where(wheel)}; reviewed releases: {known}", soft_wrap=True)
        if wheel is None:
            console.print(f"platform: {_platform()}", soft_wrap=True)
        _print(console, version, reference, findings)
    fine = all(f.state == "fine" for f in findings)
    raise typer.Exit(0 if fine and reference.sglang == version else 1)


def _where(wheel: Path | None) -> str:
    return "" if wheel is None else f" of {wheel.name}"


def _print(console: Console, version: str, reference: Inventory, findings: list[Finding]) -> None:
    from rich.table import Table

    from sglang_probe.engine.releases import drift

    told = drift.accepted(version)
    if told is not None and told.get("certificate"):
        console.print(f"accepted on this machine as {told['as']}, by certificate {told['certificate'][:16]}")
    if reference.sglang != version:
        console.print(
            f"[bold yellow]{version} has not been reviewed[/]; compared with the inventory of {reference.sglang}"
        )
    table = Table(box=None, padding=(0, 1))
    for column in ("state", "how", "feature", "target (under sglang.srt)"):
        table.add_column(column, overflow="fold")
    for f in findings:
        name = f.target.target.removeprefix("sglang.srt.")
        if f.absent:
            name += f"\n  mentions no {', '.join(f.absent)}"
        elif f.state != "fine":
            name += f"\n  reviewed {f.target.fingerprint}, found {f.found or 'nothing'}"
        table.add_row(f"[{_STYLE[f.state]}]{f.state}[/]", f.target.hook, f.target.feature, name)
    console.print(table)
    bad = sum(f.state != "fine" for f in findings)
    console.print(f"{len(findings)} targets, {bad} not as reviewed")
    for feature, states in _features(findings).items():
        if wrong := {state: n for state, n in states.items() if state != "fine" and n}:
            counts = ", ".join(f"{n} {state}" for state, n in wrong.items())
            everything = ", which every recording needs" if feature == _EVERYTHING else ""
            console.print(f"[bold red]blocks {feature}[/]{everything}: {counts} of {sum(states.values())}")


def _features(findings: list[Finding]) -> dict[str, dict[str, int]]:
    """Targets of each feature by state."""
    features: dict[str, dict[str, int]] = {}
    for f in findings:
        states = features.setdefault(f.target.feature, {"fine": 0, "changed": 0, "missing": 0})
        states[f.state] += 1
    return features


def _told(version: str, wheel: Path | None, reference: Inventory, findings: list[Finding]) -> dict[str, Any]:
    features = _features(findings)
    return {
        "sglang": version,
        "wheel": None if wheel is None else wheel.name,
        "compared_with": reference.sglang,
        "reviewed": reference.sglang == version,
        "features": features,
        "blocked": [name for name, states in features.items() if states["changed"] or states["missing"]],
        "targets": [
            {
                "target": f.target.target,
                "hook": f.target.hook,
                "feature": f.target.feature,
                "state": f.state,
                "reviewed": f.target.fingerprint,
                "found": f.found,
                "absent": list(f.absent),
            }
            for f in findings
        ],
    }


def _platform() -> str:
    from sglang_probe.engine.platform.environment import DEVICE, cpu_chosen, platform_facts
    from sglang_probe.errors import InventoryError

    try:
        facts = platform_facts()
    except InventoryError:
        return "not known for a release that was not reviewed"
    if facts["device"] == "accelerator":
        return f"an accelerator is present, SGLang's own platform is used; {DEVICE}=cpu leaves it alone"
    why = f"{DEVICE}=cpu" if cpu_chosen() else "no accelerator found"
    how = (
        "bf16 by this CPU" if facts["bf16_products"] == "bf16" else "bf16 in fp32, because this CPU has no bf16 kernels"
    )
    return f"{why}, the CPU reference platform is used; it multiplies {how}"
