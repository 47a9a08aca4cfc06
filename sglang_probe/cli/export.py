"""`sglang-probe export hf`, `perfetto`, `saelens`, `eagle`, `neuronpedia` and `delphi`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Runs and features as other tools read them.", no_args_is_help=True, rich_markup_mode="markdown")

RunFolder = Annotated[Path, typer.Argument(help="Run directory, or closed segment of a live recording.")]
Output = Annotated[Path, typer.Option(help="Folder to make.")]
Overwrite = Annotated[bool, typer.Option(help="Make it again if an export is there.")]
SaeFolder = Annotated[
    Path, typer.Option(help="Folder of an SAE: of `sglang-probe sae train`, SAELens, or Gemma Scope.")
]
Most = Annotated[int, typer.Option(help="Rows to read, whole requests drawn at random.")]


@app.command("hf")
def hf(
    run: RunFolder,
    output: Output,
    hook_point: Annotated[list[str] | None, typer.Option(help="Which rows; may be repeated. Default: all.")] = None,
    where: Annotated[str | None, typer.Option(help="Which positions: a query over `run.tokens()`.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Rows as a dataset of the Hugging Face hub: Parquet and a card, one row for each computed position.

    Example: `sglang-probe export hf runs/mine --output mine-hf`, then `datasets.load_dataset("mine-hf")`
    """
    from sglang_probe.export.hf import export_hf
    from sglang_probe.run.run import load_run

    with _bar("rows") as tell:
        n = export_hf(load_run(run), output, hook_points=hook_point, where=where, overwrite=overwrite, tell=tell)
    _say(f"{n:,} rows in {output}; open it with datasets.load_dataset({str(output)!r}, split='train')")


@app.command("perfetto")
def perfetto(
    run: RunFolder,
    output: Annotated[Path, typer.Option(help="File to write, e.g. `trace.json`.")],
    first: Annotated[float, typer.Option(help="Seconds after the first launch at which it begins.", min=0)] = 0.0,
    seconds: Annotated[float, typer.Option(help="How long it is; 0: until the end.", min=0)] = 60.0,
) -> None:
    """A minute of a server as a trace: forward passes, and of each request what was computed when, reused, and why.

    Example: `sglang-probe export perfetto runs/mine --output trace.json`, then open it on https://ui.perfetto.dev
    """
    from sglang_probe.export.perfetto import export_perfetto
    from sglang_probe.run.run import load_run

    n = export_perfetto(load_run(run), output, first=first, seconds=seconds or None)
    _say(f"{n:,} events in {output}; open it on https://ui.perfetto.dev")


@app.command("saelens")
def saelens(
    run: RunFolder,
    output: Output,
    hook_point: Annotated[str, typer.Option(help="Which rows, e.g. `blocks.10.hook_resid_post`.")],
    context: Annotated[int, typer.Option(help="Positions of a context: SAELens' `context_size`.", min=1)] = 128,
    overwrite: Overwrite = False,
) -> None:
    """Rows as SAELens' `ActivationsStore` reads them (`cached_activations_path`). Needs the package `datasets`.

    Example: `sglang-probe export saelens runs/mine --hook-point blocks.10.hook_resid_post --output cached`
    """
    from sglang_probe.export.saelens import export_saelens
    from sglang_probe.run.run import load_run

    with _bar("contexts") as tell:
        found = export_saelens(load_run(run), output, hook_point, context=context, overwrite=overwrite, tell=tell)
    _say(
        f"{found.contexts:,} contexts of {context} in {output}; {found.repeated:,} were repeats of others and "
        f"{found.rest:,} positions fill no context\nuse it with   use_cached_activations=True, "
        f"cached_activations_path={str(output)!r}, context_size={context}"
    )


@app.command("eagle")
def eagle(
    run: RunFolder,
    output: Output,
    hook_point: Annotated[
        list[str] | None,
        typer.Option(help="Residual streams by layer, the model's last one last; may be repeated. Default: all."),
    ] = None,
    learned: Annotated[
        list[str] | None,
        typer.Option(help="Segments that count in the loss; may be repeated. Default: `generated`, `assistant`."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Whole requests as a trainer of EAGLE drafters reads them: `hs_<i>.safetensors` and a dataset.

    The layout is that of vLLM's `speculators`. Rows that requests share are written for each of them. Needs the
    package `datasets`.

    Example: `sglang-probe export eagle runs/mine --output drafts`, then train with `--data-path drafts`
    """
    from sglang_probe.export.eagle import export_eagle, layer_ids
    from sglang_probe.run.run import load_run
    from sglang_probe.run.samples import LEARNED

    with _bar("samples") as tell:
        how = {"hook_points": hook_point, "learned": learned or LEARNED, "overwrite": overwrite}
        samples = export_eagle(load_run(run), output, **how, tell=tell)  # type: ignore[arg-type]
    ids = " ".join(map(str, layer_ids(samples.hook_points)))
    _say(
        f"{len(samples):,} samples of {int(samples.offsets[-1]):,} positions in {output}\n"
        f"train with   --data-path {output} --on-missing raise --target-layer-ids {ids}"
    )
    if samples.left_out:
        rid, why = next(iter(samples.left_out.items()))
        _say(f"{len(samples.left_out):,} requests are not whole and were left out; {rid}: {why}")


@app.command("neuronpedia")
def neuronpedia(
    run: RunFolder,
    sae: SaeFolder,
    output: Output,
    name: Annotated[str, typer.Option(help="Of the set of dictionaries, without the layer, e.g. `res-2k`.")],
    creator: Annotated[str, typer.Option(help="Who made it.")],
    creator_id: Annotated[str, typer.Option(help="Of the user on the server that imports it.")] = "",
    labels: Annotated[
        Path | None, typer.Option(help="Results of `sglang-probe features --label-with` of this SAE: their labels too.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Folder of the checkpoint; default: the run's.")] = None,
    most: Most = 200_000,
    overwrite: Overwrite = False,
) -> None:
    """Features as the folder that a Neuronpedia server imports: examples, tokens, decoder rows, labels.

    Labels are heuristic, and with `--labels` those of a model too, under its name. Scores of all of them, with their
    nulls, are in a file beside the folder, because its import takes none.

    Example: `sglang-probe export neuronpedia runs/mine --sae saes/mine --name res-2k --creator me --output np`
    """
    from sglang_probe.export.neuronpedia import export_neuronpedia
    from sglang_probe.sae.folder import read_sae, weights_sha256
    from sglang_probe.studies.features.labelled import read_labelled
    from sglang_probe.studies.features.study import study

    labelled = None
    if labels is not None:
        labelled = read_labelled(labels, weights_sha256(sae), str(read_sae(sae).hook_point))
    with _bar("rows") as tell:
        result = study(run, sae, model=model, most=most, tell=tell)
        how = {"name": name, "creator": creator, "creator_id": creator_id, "overwrite": overwrite}
        place = export_neuronpedia(result, sae, output, labelled=labelled, **how)  # type: ignore[arg-type]
    by = "" if labelled is None else f", and {len(labelled.labels):,} by {labelled.model}"
    _say(f"{int((result.latents['rate'] > 0).sum()):,} features in {place}; labels are heuristic{by}")
    _say(f"scores of the labels, which its import does not take: {place}.scores.jsonl")


@app.command("delphi")
def delphi(
    run: RunFolder,
    sae: SaeFolder,
    output: Output,
    context: Annotated[int, typer.Option(help="Tokens of a context.", min=1)] = 64,
    splits: Annotated[int, typer.Option(help="Files that the latents are spread over.", min=1)] = 5,
    model: Annotated[str | None, typer.Option(help="Name of the model, for its tokenizer; default: the run's.")] = None,
    most: Most = 200_000,
    overwrite: Overwrite = False,
) -> None:
    """Codes as delphi's latent cache, which its explainers and scorers start from.

    Example: `sglang-probe export delphi runs/mine --sae saes/mine --output latents`
    """
    from sglang_probe.export.delphi import code_and_export

    with _bar("rows") as tell:
        how = {"model": model, "context": context, "splits": splits, "most": most, "overwrite": overwrite}
        found = code_and_export(run, sae, output, **how, tell=tell)  # type: ignore[arg-type]
    _say(f"{len(found.places):,} contexts of {context} in {output}; {found.rest:,} positions fill no context")


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console

    from sglang_probe.studies.base import bar

    with bar(Console(stderr=True), what) as tell:
        yield tell


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(text, markup=False, highlight=False, soft_wrap=True)
