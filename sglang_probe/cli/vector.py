"""`sglang-probe vector`: a library of vectors that a server steers, clamps and scores by."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sglang_probe.run.run import Run
    from sglang_probe.steering.library import Vector
    from sglang_probe.steering.make import Target

app = typer.Typer(
    help="A library of vectors: a folder of named directions, SAE features and probes, each with a card that says how "
    "it was made and what is known of it. A server loads the folder; requests name what is in it, and nothing else.",
    no_args_is_help=True,
)
make = typer.Typer(
    help="Make a vector and write it into a library. Every card has the hash of the model's weights: a server refuses "
    "what was made from another model.",
    no_args_is_help=True,
)
app.add_typer(make, name="make")


class Phase(StrEnum):
    prefill = "prefill"
    decode = "decode"


class Position(StrEnum):
    last = "last"
    mean = "mean"


Name = Annotated[str, typer.Argument(help="Name of the vector: letters, digits, `.`, `_`, `-`.")]
InLibrary = Annotated[Path, typer.Option("--library", help="Folder of the library; made if need be.")]
Positive = Annotated[
    Path,
    typer.Option(
        help='Prompts that have what the vector is about: a run directory, a JSONL file (`{"prompt": ...}` or '
        '`{"messages": [...]}` a line), or a YAML with `workload`.'
    ),
]
Negative = Annotated[Path, typer.Option(help="Prompts that do not have it; as `--positive`.")]
HookPoint = Annotated[str, typer.Option(help="Where: `blocks.<layer>.hook_resid_post`.")]
ModelOption = Annotated[str, typer.Option("--model", help="Model that files of prompts are served with.")]
Dtype = Annotated[str, typer.Option(help="Dtype of that model; `auto` takes the checkpoint's.")]
Runs = Annotated[
    Path | None,
    typer.Option(help="Folder for the runs of files of prompts; default: `runs/vectors/NAME`. A run there is kept."),
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a vector of that name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the card as JSON.")]


@make.command("mean-difference")
def mean_difference(
    name: Name,
    library: InLibrary,
    positive: Positive,
    negative: Negative,
    hook_point: HookPoint,
    phase: Annotated[
        Phase, typer.Option(help="Rows of the prompts, or of the tokens that the model generates after them.")
    ] = Phase.prefill,
    position: Annotated[
        Position | None,
        typer.Option(
            help="The last row of each prompt, or the mean over all; default: `last` of a prompt, `mean` of generated "
            "tokens."
        ),
    ] = None,
    model: ModelOption = "probe-text",
    dtype: Dtype = "auto",
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens to generate for each prompt, with `--phase decode`.")
    ] = 32,
    runs: Runs = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """The mean row of one set of prompts minus that of another: a direction to add or to project out.

    The card has the norm, the mean norm of rows at the hook point (the unit `mean_norm` of strengths), and as evidence
    how well a vector made from half of the prompts tells the other half apart (AUC with a 95 % interval; 0.5 is
    chance), and the cosine between the vectors of the two halves. Twelve prompts of each kind are the least for an
    interval. Position 0 and rows of more than ten times the median norm are left out.

    Example: `sglang-probe vector make mean-difference formal --library vectors --positive formal.jsonl --negative
    casual.jsonl --model smollm2-135m --hook-point blocks.10.hook_resid_post`
    """
    from sglang_probe.steering import make as making

    decode = phase is Phase.decode
    place = position or (Position.mean if decode else Position.last)
    target = _target(library, name, hook_point, overwrite)
    a, b = _pair(target, positive, negative, hook_point, model, dtype, new_tokens if decode else 1, runs)
    told: Any = {"phase": phase.value, "place": place.value, "seed": seed}
    _show(making.mean_difference(target, a, b, hook_point, **told), as_json)


@make.command("probe")
def probe(
    name: Name,
    library: InLibrary,
    positive: Positive,
    negative: Negative,
    hook_point: HookPoint,
    fpr: Annotated[
        float,
        typer.Option(help="False positive rate of the threshold: how often it may fire on prompts of no concern."),
    ] = 0.05,
    penalty: Annotated[float, typer.Option(min=1e-6, help="L2 penalty on the weights of standardised rows.")] = 0.01,
    model: ModelOption = "probe-text",
    dtype: Dtype = "auto",
    runs: Runs = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A linear probe on the last row of a prompt: what scores every token (`hook_scores`), or opens the gate of a
    request's interventions (`gate: {by: probe, probe: NAME}`) above its threshold.

    Logistic regression on half of the prompts. The other half gives the ROC curve, the AUC with its interval, and the
    threshold: with m negative ones it is such that a new negative prompt fires with probability `--fpr` at most,
    provided it is drawn like those. A rate of 0.05 needs 19 held-out negatives, 38 in all.

    Example: `sglang-probe vector make probe code --library vectors --positive code.jsonl --negative prose.jsonl --model
    smollm2-135m --hook-point blocks.10.hook_resid_post --fpr 0.05`
    """
    from sglang_probe.steering import probe as probing

    target = _target(library, name, hook_point, overwrite)
    a, b = _pair(target, positive, negative, hook_point, model, dtype, 1, runs)
    _show(probing.write(target, a, b, hook_point, fpr=fpr, seed=seed, penalty=penalty), as_json)


@make.command("sae-feature")
def sae_feature(
    name: Name,
    library: InLibrary,
    sae: Annotated[Path, typer.Option(help="Folder of an SAE, as SAELens or Gemma Scope have it.")],
    feature: Annotated[int, typer.Option(help="Its number, from 0.")],
    run: Annotated[Path, typer.Option(help="A run with rows of the SAE's hook point, of the SAE's model.")],
    direction: Annotated[
        bool,
        typer.Option(
            "--direction", help="Its decoder row alone: to add or project out, whatever the architecture of the SAE."
        ),
    ] = False,
    same_model: Annotated[
        bool, typer.Option("--same-model", help="The run is of the SAE's model, although the names differ.")
    ] = False,
    hook_point: Annotated[
        str | None, typer.Option(help="`blocks.<layer>.hook_resid_post`, for folders that do not say (Gemma Scope).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """One feature of an SAE: its decoder row, and its encoder, so that it can be clamped, capped and ablated.

    The run gives the hash of the weights, the mean norm of rows, and the feature's rate and 99th percentile where it
    is active (the unit `p99` of strengths). A feature of a TopK SAE has no activation of its own: take a BatchTopK or
    standard SAE, or `--direction`.

    Example: `sglang-probe vector make sae-feature paths --library vectors --sae sae/block10 --feature 1187 --run
    runs/mine`
    """
    from sglang_probe.run.run import load_run
    from sglang_probe.steering import make as making

    target = _target(library, name, hook_point, overwrite)
    _show(
        making.sae_feature(
            target, sae, feature, load_run(run), direction=direction, trust=same_model, hook_point=hook_point
        ),
        as_json,
    )


@make.command("sae")
def sae_command(
    name: Name,
    sae: Annotated[Path, typer.Argument(help="Folder of an SAE, as SAELens or Gemma Scope have it.")],
    library: InLibrary,
    run: Annotated[
        Path | None, typer.Option(help="A run of its model, for SAEs that do not say from whose weights they are.")
    ] = None,
    same_model: Annotated[
        bool, typer.Option("--same-model", help="The run is of the SAE's model, although the names differ.")
    ] = False,
    hook_point: Annotated[
        str | None, typer.Option(help="`blocks.<layer>.hook_resid_post`, for folders that do not say (Gemma Scope).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A whole SAE, so that requests can `splice` its reconstruction in place of the residual stream.

    The card names the folder and has the hashes of its files, which are checked whenever the library is read. An SAE
    inside the library or beside it stays where it is; another is copied into the library. Every spliced row is
    encoded and decoded with all latents: this is for measuring, not for serving.

    Example: `sglang-probe vector make sae block10 saes/mine/2304-0 --library vectors`
    """
    from sglang_probe.run.run import load_run
    from sglang_probe.steering import make as making

    target = _target(library, name, hook_point, overwrite)
    made_from = None if run is None else load_run(run)
    _show(making.whole_sae(target, sae, made_from, trust=same_model, hook_point=hook_point), as_json)


@make.command("random")
def random(
    name: Name,
    library: InLibrary,
    run: Annotated[Path, typer.Option(help="A run with rows of the hook point.")],
    hook_point: Annotated[
        str | None, typer.Option(help="Where: `blocks.<layer>.hook_resid_post`; default: that of `--like`.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="Vector of the library that it is a control for: its norm is taken.")
    ] = None,
    norm: Annotated[float | None, typer.Option(min=0.0, help="Norm, without `--like`.")] = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows that the covariance is taken from, at most.")] = 20_000,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A control: a random direction drawn from the covariance of the rows of a run, with the norm of another vector.

    An isotropic random direction is too weak a control, because the residual stream has few directions of much
    variance. Whatever a vector is said to do, this should do much less of it. Use several seeds.

    Example: `sglang-probe vector make random formal-random-1 --library vectors --run runs/mine --like formal --seed 1`
    """
    from sglang_probe.errors import ConfigError
    from sglang_probe.run.run import load_run
    from sglang_probe.steering import make as making
    from sglang_probe.steering.library import Library

    other = None if like is None else Library.open(library)[like]
    point = hook_point or (None if other is None else other.card.hook_point)
    if point is None:
        raise ConfigError("there is no hook point", fix="give `--hook-point`, or `--like` a vector that has one")
    if norm is not None and other is not None:
        raise ConfigError("`--norm` and `--like` both say how long it is", fix="give one of them")
    target = _target(library, name, point, overwrite)
    vector = making.random_control(target, load_run(run), point, seed=seed, norm=norm, like=other, rows=rows)
    _show(vector, as_json)


@app.command("list")
def list_command(
    library: Annotated[Path, typer.Argument(help="Folder of a library.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable: every card, and its hash.")] = False,
) -> None:
    """List the vectors of a library, after every file was checked against its card."""
    import json

    from rich.console import Console
    from rich.table import Table

    from sglang_probe.steering.library import Library, listed

    found = Library.open(library)
    if as_json:
        typer.echo(json.dumps(listed(found), indent=2))
        return
    table = Table(box=None, padding=(0, 1))
    for column in ("name", "kind", "hook point", "model", "norm", "mean norm of rows", "hash"):
        table.add_column(column, overflow="fold")
    for v in found.values():
        c = v.card
        norm = _number(c.norm) if c.norm else "-"
        table.add_row(c.name, c.kind, c.hook_point, c.model, norm, _number(c.layer_mean_norm), v.hash[:12])
    Console().print(table)


@app.command("show")
def show(
    library: Annotated[Path, typer.Argument(help="Folder of a library.")],
    name: Annotated[str, typer.Argument(help="Name of a vector in it.")],
    as_json: AsJson = False,
) -> None:
    """Show the card of a vector: where it belongs, how it was made, and what is known of its effect."""
    from sglang_probe.steering.library import Library

    _show(Library.open(library)[name], as_json)


def _target(folder: Path, name: str, hook_point: str | None, overwrite: bool) -> Target:
    """Where to write, refused before anything is recorded if it cannot be."""
    from sglang_probe.steering.library import refuse_soon
    from sglang_probe.steering.make import Target

    refuse_soon(folder, name, hook_point, overwrite=overwrite)
    return Target(folder, name, overwrite)


def _pair(
    target: Target,
    positive: Path,
    negative: Path,
    hook_point: str,
    model: str,
    dtype: str,
    new_tokens: int,
    runs: Path | None,
) -> tuple[Run, Run]:
    from rich.console import Console

    from sglang_probe.harvest.contrast import Recorder, runs_of
    from sglang_probe.harvest.progress import Terminal

    recorder = Recorder(
        runs or Path("runs") / "vectors" / target.name,
        hook_point,
        model,
        new_tokens=new_tokens,
        dtype=dtype,
        reporter=Terminal(Console(stderr=True)),
    )
    found = runs_of({"positive": positive, "negative": negative}, recorder)
    return found["positive"], found["negative"]


def _show(vector: Vector, as_json: bool) -> None:
    import json

    from rich.console import Console

    if as_json:
        typer.echo(json.dumps({**vector.card.model_dump(mode="json"), "hash": vector.hash}, indent=2))
        return
    console, c = Console(), vector.card
    lines = [
        ("kind", c.kind),
        ("hook point", c.hook_point),
        ("model", f"{c.model}, weights {(c.model_weight_hash or 'unknown')[:12]}"),
        *([] if c.norm is None else [("norm", _norm(c.norm, c.layer_mean_norm))]),
        *([("folder", c.sae.folder)] if c.sae else [("mean norm of rows", _number(c.layer_mean_norm))]),
        *([("99th percentile", _number(c.percentile99))] if c.kind == "feature" else []),
        ("made by", c.made_by.command + (f", {c.made_by.phase} rows" if c.made_by.phase else "")),
        *((k.replace("_", " "), _words(v)) for k, v in c.evidence.items() if k != "roc"),
        ("hash", vector.hash),
    ]
    console.print(f"[bold]{c.name}[/]", highlight=False)
    for key, value in lines:
        console.print(f"  {key}: {value}", markup=False, highlight=False, soft_wrap=True)


def _norm(norm: float, unit: float | None) -> str:
    return f"{norm:.5g}" + (f" = {norm / unit:.3g} mean norms" if unit else "")


def _words(value: Any) -> str:
    """A piece of evidence on one line."""
    if isinstance(value, dict) and {"estimate", "low", "high"} <= value.keys():
        known = value["low"] is not None and value["high"] is not None
        ends = f" (95 % interval {value['low']:.3f} to {value['high']:.3f})" if known else " (too few for an interval)"
        return _number(value["estimate"]) + ends
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return _number(value) if isinstance(value, float) else str(value)


def _number(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.4g}"
