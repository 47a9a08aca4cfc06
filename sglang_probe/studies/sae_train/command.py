"""`sglang-probe sae train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.studies.base import (
    EXPERIMENT,
    Parameter,
    Plan,
    Study,
    example_option,
    opened,
    option,
    output_option,
    schema_option,
    show,
)

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.report.page import Page
    from sglang_probe.report.tables import Table
    from sglang_probe.studies.sae_train.config import SaeTrainConfig
    from sglang_probe.studies.sae_train.study import TrainResult

    Telling = Callable[[str], Callable[[dict[str, float]], None]]

EXAMPLE = """
# sglang-probe sae train mine.yaml        (needs SAELens: pip install 'sglang-probe[sae]')
runs: [runs/mine]                         # run directories with rows of the hook point
hook_point: blocks.10.hook_resid_post
architecture: batchtopk                   # topk, jumprelu, standard
k: 32                                     # latents that are active in a row
latents: [2304]                           # size of the dictionary; several are trained one after another
samples: 700000                           # rows to train on, repeated ones counted each time
deduplicate: 32                           # leave out a position whose last 32 tokens were seen before
# mix: {prefill: 0.5, decode: 0.5}        # by default as recorded
# exclude: {first_positions: 1, norm_multiple: 10}   # attention sinks; the default
# seeds: [0, 1]                           # the same batches, another initialisation
"""


class SaeTrain(Study):
    """Which features do recorded rows hold? Train sparse autoencoders (SAEs), and judge them on rows held out.

    Attention sinks are left out, by position and by norm, and counted. Requests of some families are held out.
    BatchTopK dictionaries get a threshold that is measured there: the one that training leaves is wrong after few
    steps. Each dictionary is a folder that SAELens opens (`SAE.load_from_disk`), and `sglang_probe.sae.read_sae`
    without it; its metadata say of which model, runs, exclusions and seeds it is, and how good.

    `--resume` goes on from the last checkpoint, with the same result as if nothing had happened. Training needs
    SAELens: `pip install 'sglang-probe[sae]'`.

    Example: `sglang-probe sae train mine.yaml --output saes/mine`
    """

    name = "sae train"

    def parameters(self) -> list[Parameter]:
        """The YAML, and what to do with what is there."""
        flags = {
            "overwrite": "Delete the dictionaries that were trained here, and train them again.",
            "resume": "Keep complete dictionaries, finish the interrupted one, and train the rest.",
            "report_only": "Write the report of what was trained; train nothing.",
            "plan": "Print what would be trained on how many rows, and stop.",
        }
        return [
            EXPERIMENT,
            output_option("Folder of the dictionaries; default: `<output>/<name>` of the YAML."),
            *(option(name, bool, False, help) for name, help in flags.items()),
            option("example", bool, False, example_option(EXAMPLE)),
            option("schema", bool, False, schema_option(_config)),
        ]

    def obtain(self, given: Mapping[str, Any], console: Console) -> tuple[TrainResult, Path] | Plan:
        """Train what is missing."""
        from sglang_probe.harvest.directory import hold_directory, refuse_both

        refuse_both(overwrite=given["overwrite"], resume=given["resume"])
        config, name, folder = opened(given, _config())
        from sglang_probe.studies.sae_train.study import open_folder, prepare, read_results, train_all, wanted

        if given["report_only"]:
            return read_results(config, folder, name), folder
        with console.status("reading rows"):
            prepared = prepare(config, name)
        if given["plan"]:
            plan = _plan(wanted(config), prepared, config)
            show(console, [plan.table, *plan.notes])
            return plan
        with hold_directory(folder):
            open_folder(folder, prepared.identity, overwrite=given["overwrite"], resume=given["resume"])
            with _bars(console, config.recipe.steps) as tell:
                train_all(config, prepared, folder, tell)
        return read_results(config, folder, name), folder

    def page(self, result: TrainResult) -> Page:
        """The report."""
        from sglang_probe.studies.sae_train.page import train_page

        return train_page(result)

    def shown(self, result: TrainResult) -> Iterator[Table | str]:
        """The dictionaries, and what was left out."""
        from sglang_probe.studies.sae_train.page import dictionary_table, left_out_table

        yield dictionary_table(result)
        yield left_out_table(result)


def _config() -> type[SaeTrainConfig]:
    from sglang_probe.studies.sae_train.config import SaeTrainConfig

    return SaeTrainConfig


def _plan(names: list[tuple[str, int, int]], prepared: Any, config: Any) -> Plan:
    import pandas as pd

    from sglang_probe.report.tables import Table

    frame = pd.DataFrame(names, columns=["dictionary", "latents", "seed"])
    rows = prepared.identity["rows"]
    epochs = config.recipe.steps * config.batch_size / rows["epoch"]
    note = f"{rows['train']:,} rows to train on ({rows['epoch']:,} an epoch, {epochs:.1f} epochs), "
    note += (
        f"{rows['held_out']:,} held out, {int(prepared.train.left_out['rows'].sum()):,} left out as sinks or repeats"
    )
    return Plan(Table(frame, "dictionaries"), 0, [note])


@contextmanager
def _bars(console: Console, steps: int) -> Iterator[Telling]:
    """A bar for each dictionary, with loss, active latents, dead latents and explained variance of the last batch."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def of(name: str) -> Callable[[dict[str, float]], None]:
            task = progress.add_task(name, total=steps, now="")

            def tell(at: dict[str, float]) -> None:
                now = f"loss {at['loss']:.4g}  L0 {at['l0']:.1f}  dead {at['dead_share']:.1%}"
                now += f"  EV {at['explained_variance']:.3f}"
                progress.update(task, completed=at["step"], now=now)

            return tell

        yield of
