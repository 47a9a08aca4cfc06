"""`sglang-probe lossless`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    experiment: Annotated[Path, typer.Argument(help="YAML of an experiment that `ab` has run.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the experiment; default: `<output>/<name>`.")] = None,
) -> None:
    """Compare what a cached harvest gathers through lineage with what a harvest without cache computes.

    Prints how many positions have a row, what the cache saved in time, and the distance between the rows beside the
    distance of a run without cache to itself, and to one whose prefill was cut elsewhere. Writes `lossless.json`.
    """
    import json

    from rich.console import Console

    from sglang_probe.cli.output import print_frame
    from sglang_probe.config import load_config
    from sglang_probe.run.run import Run, load_run
    from sglang_probe.studies.ab.config import AbConfig
    from sglang_probe.studies.ab.lossless import study_lossless
    from sglang_probe.studies.ab.plan import plan

    console = Console()
    config = load_config(experiment, AbConfig)
    folder = output or config.output / (config.name or experiment.stem)
    arms: dict[str, list[Run]] = {name: [] for name in config.arms}
    for p in sorted(plan(config), key=lambda p: p.replicate):
        arms[p.arm].append(load_run(folder / p.name))
    result = study_lossless(arms)
    print_frame(console, result.coverage, "positions with a row", {"covered": ".1%", "seconds": ".1f"})
    deepest = result.distance["hook_point"].iloc[-1]
    shown = result.distance[result.distance["hook_point"] == deepest]
    formats = {"identical": ".1%", "l2_median": ".2g", "l2_p99": ".2g", "l2_max": ".2g"}
    for kind, part in shown.groupby("positions", sort=False):
        frame = part.drop(columns=["hook_point", "positions", "runs"])
        print_frame(console, frame, f"relative L2 of {deepest}, positions {kind} (lossless.json has all)", formats)
    console.print("faster than without cache, by replicate: " + ", ".join(f"{s:.2f} x" for s in result.speedup))
    path = folder / "lossless.json"
    path.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    console.print(f"written: [bold]{path}[/]", soft_wrap=True)
