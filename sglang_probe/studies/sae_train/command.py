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
# buffer_mib: 1024                        # memory for rows; of more, so many are shuffled at a time
# seeds: [0, 1]                           # the same batches, another initialisation
# harvest: {model: smollm2-135m, workload: {source: documents, count: 4000}}   # in place of runs: rows are not kept
"""


class SaeTrain(Study):
    """Which features do recorded rows hold? Train sparse autoencoders (SAEs), and judge them on rows held out.

    Attention sinks are left out, by position and by norm, and counted. Requests of some families are held out.
    BatchTopK dictionaries get a threshold that is measured there: the one that training leaves is wrong after few
    steps. Each dictionary is a folder that SAELens opens (`SAE.load_from_disk`), and `sglang_probe.sae.read_sae`
    without it; its metadata say of which model, runs, exclusions and seeds it is, and how good.

    Rows stay in their runs: 1 GiB of them is in memory at a time (`buffer_mib`), within which they are shuffled.

    With `harvest` in place of `runs`, requests are recorded some at a time, trained on and forgotten: for harvests that
    do not fit on the disk.

    `--resume` goes on from the last checkpoint, with the same result as if nothing had happened; with `harvest`, what
    was in memory is recorded again with the same output tokens, so that no row is used twice or left out, but its
    numbers may differ in the last bits. Training needs SAELens: `pip install 'sglang-probe[sae]'`.

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
        if config.harvest is not None:
            return self._streamed(config, name, folder, given, console)
        with console.status("reading rows"):
            prepared = prepare(config, name)
        if given["plan"]:
            plan = _plan(wanted(config), prepared, config)
            show(console, [plan.table, *plan.notes])
            return plan
        with hold_directory(folder):
            open_folder(folder, prepared.identity, overwrite=given["overwrite"], resume=given["resume"])
            with _bars(console, config.recipe.steps) as (tell, _):
                train_all(config, prepared, folder, tell)
        return read_results(config, folder, name), folder

    def _streamed(
        self, config: SaeTrainConfig, name: str, folder: Path, given: Mapping[str, Any], console: Console
    ) -> tuple[TrainResult, Path] | Plan:
        """Record and train in one process."""
        from sglang_probe.harvest.directory import hold_directory
        from sglang_probe.studies.sae_train.parts import parts_of
        from sglang_probe.studies.sae_train.stream import prepare_stream, split_requests, train_stream
        from sglang_probe.studies.sae_train.study import read_results, wanted

        with console.status("checking model and workload"):
            prepared = prepare_stream(config)
        if given["plan"]:
            assert config.harvest is not None
            training, held_out = split_requests(config, prepared.workload.requests)
            parts = len(parts_of(training, config.harvest.requests))
            note = f"{len(training):,} requests to train on, recorded {config.harvest.requests} at a time in {parts} "
            note += f"parts and not kept; {len(held_out):,} requests held out"
            plan = Plan(_planned(wanted(config)), 1, [note])
            show(console, [plan.table, *plan.notes])
            return plan
        with hold_directory(folder), _bars(console, config.recipe.steps) as (tell, status):
            again = {n: given[n] for n in ("overwrite", "resume")}
            train_stream(config, prepared, folder, **again, tell=tell, status=status)
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


def _planned(names: list[tuple[str, int, int]]) -> Table:
    import pandas as pd

    from sglang_probe.report.tables import Table

    return Table(pd.DataFrame(names, columns=["dictionary", "latents", "seed"]), "dictionaries")


def _plan(names: list[tuple[str, int, int]], prepared: Any, config: Any) -> Plan:
    rows = prepared.identity["rows"]
    epochs = config.recipe.steps * config.batch_size / rows["epoch"]
    note = f"{rows['train']:,} rows to train on ({rows['epoch']:,} an epoch, {epochs:.1f} epochs), "
    note += (
        f"{rows['held_out']:,} held out, {int(prepared.train.left_out['rows'].sum()):,} left out as sinks or repeats"
    )
    notes = [note, _memory(prepared, config)]
    return Plan(_planned(names), 0, notes)


def _memory(prepared: Any, config: Any) -> str:
    mib = prepared.train.row_bytes / 2**20
    if (together := prepared.order.together) is None:
        return f"all of them in memory: {mib * len(prepared.train):,.0f} MiB of `buffer_mib: {config.buffer_mib}`"
    n = len(prepared.order.ends)
    return f"{together:,} of them in memory ({mib * together:,.0f} MiB): an epoch is {n} fills, shuffled one by one"


@contextmanager
def _bars(console: Console, steps: int) -> Iterator[tuple[Telling, Callable[[str], None]]]:
    """A bar for each dictionary, with loss, active latents, dead latents and explained variance of the last batch; and
    what shows a line of text meanwhile."""
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

        line: list[Any] = []

        def status(text: str) -> None:
            if not line:
                line.append(progress.add_task("", total=None, now=""))
            progress.update(line[0], description=text, visible=bool(text))

        yield of, status
