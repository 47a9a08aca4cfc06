"""`sglang-probe prove`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from sglang_probe.prove.drift import Trial
    from sglang_probe.prove.prove import Proof


def command(
    model: Annotated[
        str, typer.Option(help="A name of `sglang-probe model list`, a folder, or a hub id.")
    ] = "probe-text",
    server: Annotated[
        str, typer.Option(help="SGLang server arguments as JSON, those that you will serve or harvest with.")
    ] = "{}",
    dtype: Annotated[str, typer.Option(help="`bfloat16`, `float16`, `float32`; `auto`: the checkpoint's.")] = "auto",
    hook_point: Annotated[
        list[str] | None,
        typer.Option(help="Rows to prove, several times; default: embedding, three residuals, attention of one layer."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the certificate here too.")] = None,
    seed: Annotated[int, typer.Option(help="Of the traffic.")] = 1,
    requests: Annotated[int, typer.Option(help="Of each of three recordings.")] = 40,
    transformers: Annotated[int, typer.Option(help="Requests that `transformers` computes again.")] = 4,
    rounds: Annotated[int, typer.Option(help="Of the measurement of what recording costs; 6 for an interval.")] = 8,
    kept_sets: Annotated[
        bool,
        typer.Option(help="Prove kept sets (`evict`) too; on an accelerator set `disable_cuda_graph` in `--server`."),
    ] = False,
    keep: Annotated[Path | None, typer.Option(help="Leave the recordings in this folder, which must be new.")] = None,
    accept_drift: Annotated[
        bool,
        typer.Option(help="Try a release of SGLang that was not reviewed, and accept it on this machine if proved."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate instead of the table.")] = False,
) -> None:
    """Prove that what the probe records is right on this machine: this SGLang, device, model and server arguments.

    Starts one engine, serves random traffic (shared prefixes, twins, continuations, chunks, mixed batches, aborts,
    retractions) and checks: every invariant of `verify`; the owner of every attended position against the KV slots read
    from the device; rows against `transformers`; with `--kept-sets`, requests that attend to a part of their cache
    against a `transformers` model under the same masks. Measures what recording costs, too. Takes minutes: 3 to 11 on
    two busy cores.

    Writes a certificate (JSON) into the cache folder, where later recordings find it, and to `--output`. Exit code 0 if
    everything holds, 1 if something does not, 2 if the engine cannot be started so.

    Example: `sglang-probe prove --model smollm2-135m --server '{"attention_backend": "triton"}'`
    """
    import json

    from rich.console import Console

    from sglang_probe.config import parse_config
    from sglang_probe.errors import ConfigError, ProbeError
    from sglang_probe.harvest.progress import Quiet, Terminal
    from sglang_probe.prove import drift
    from sglang_probe.prove.config import ProofConfig
    from sglang_probe.prove.prove import prove
    from sglang_probe.run.certificate import default_path, write_certificate

    try:
        arguments = json.loads(server)
    except ValueError as e:
        raise ConfigError(f"`--server` is no JSON: {e}", fix="""e.g. --server '{"page_size": 16}'""") from None
    if not isinstance(arguments, dict):
        raise ConfigError("`--server` is no mapping", fix="""e.g. --server '{"page_size": 16}'""")
    if keep is not None and keep.exists():
        raise ConfigError(f"`--keep {keep}` exists", fix="name a new folder")
    given: dict[str, Any] = {"model": model, "dtype": dtype, "server": arguments, "hook_points": hook_point or []}
    given |= {"kept_sets": kept_sets, "seed": seed, "requests": requests, "references": transformers, "rounds": rounds}
    config = parse_config(given, ProofConfig, where="prove")
    console = Console(stderr=as_json)
    if accept_drift:
        drift.refuse_less(config)
    trial = _on_trial(console) if accept_drift else None
    try:
        proof = prove(config, reporter=Quiet() if as_json else Terminal(console), folder=keep)
        made = proof.certificate(config)
        if trial is not None and proof.passed:
            console.print(f"accepted as {trial.told['as']}: {trial.accept(made['sha256'])}", soft_wrap=True)
    except ProbeError:
        for finding in [] if trial is None else trial.drifted:
            console.print(f"  changed: {drift.said(finding)}", markup=False, highlight=False, soft_wrap=True)
        raise
    finally:
        if trial is not None:
            trial.drop()
    written = [default_path(proof.subject), *([output] if output is not None else [])]
    for path in written:
        write_certificate(path, made)
    if as_json:
        typer.echo(json.dumps(made, indent=2))
    else:
        console.print(_table(proof))
        for a in proof.asked:
            if a.check.violation:
                console.print("[bold red]FAILED[/]", end=" ")
                console.print(f"{a.check.name}: {a.check.violation}", markup=False, highlight=False)
                for place in [] if trial is None else trial.suspects(a.check.name):
                    console.print(f"  changed: {place}", markup=False, highlight=False, soft_wrap=True)
        verdict = "[bold green]proved[/]" if proof.passed else "[bold red]NOT PROVED[/]"
        console.print(f"{verdict} in {proof.seconds:.0f} s; certificate {made['sha256'][:16]}:", highlight=False)
        for path in written:
            console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if proof.passed else 1)


def _on_trial(console: Console) -> Trial | None:
    from sglang_probe.engine.platform.environment import accelerator_present
    from sglang_probe.prove import drift

    trial = drift.begin(accelerator=accelerator_present())
    if trial is None:
        console.print("nothing drifted: this release was reviewed, and is as it was")
        return None
    told = trial.told
    console.print(f"SGLang {told['sglang']} is tried as {told['as']}; {len(trial.drifted)} places are not as reviewed")
    for feature, why in told["left_out"].items():
        console.print(f"  left out: {feature}, because a proof does not show it: {why}", soft_wrap=True)
    return trial


def _table(proof: Proof) -> Table:
    from rich.table import Table

    s = proof.subject
    of = f"{s['architecture']} in {s['dtype']}, {s['attention_backend']}"
    title = f"SGLang {s['sglang']} on {s['device']}, {of}"
    table = Table("", "check", "holds", "covered", "seconds", "note", title=title)
    for a in proof.asked:
        c = a.check
        holds = "[green]yes[/]" if c.holds else "[bold red]NO[/]"
        table.add_row(a.level, c.name, holds, f"{c.covered:,} {c.unit}", f"{a.seconds:.1f}", c.note or "")
    return table
