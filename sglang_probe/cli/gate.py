"""`sglang-probe gate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sglang_probe.studies.base import example_option, schema_option

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_probe.gate.gate import Result
    from sglang_probe.gate.launch import ServerConfig

REPORT, SUMMARY = "report.html", "summary.json"
EXAMPLE = """
# sglang-probe gate server.yaml
model: probe-text                                       # a name of `sglang-probe model list`, a folder, or a hub id
dtype: bfloat16
server: {chunked_prefill_size: 128, page_size: 16}      # SGLang server arguments
"""


def _config() -> type[ServerConfig]:
    from sglang_probe.gate.launch import ServerConfig

    return ServerConfig


def command(
    server: Annotated[
        str, typer.Argument(help="Address of a running server, or a YAML with `model:` to start one for the gate.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL of your own: a line is `{"prompt": TEXT}` or has `prompt_ids`.')
    ] = None,
    cases: Annotated[int, typer.Option(help="Prompts; six at least to compare with the floor.")] = 10,
    tokens: Annotated[
        int, typer.Option(help="Tokens of a built-in prefix; more than the server's chunk has its prefills cut.")
    ] = 192,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated for each request; default: 16, or a page of the cache and one.")
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option(
            help="Ways of reuse, several times: branch, repeat, staged, turns, company, cancelled; default: all."
        ),
    ] = None,
    company: Annotated[int, typer.Option(help="Requests at a time on the path `company`.")] = 4,
    cold: Annotated[
        str,
        typer.Option(
            help="How a request is kept from reusing: `cache_salt`, `extra_key`, `flush` (empties the server's cache, "
            "for everybody), or `auto`: the first of the salts that the server understands."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the orders and of the built-in prompts.")] = 0,
    accept: Annotated[
        str | None,
        typer.Option(help="Exit code 0 also for `within-floor`, or for `changes` and everything before it."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; default: `gate-HOST-PORT`.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier report in that folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    example: Annotated[bool, example_option(EXAMPLE)] = False,
    schema: Annotated[bool, schema_option(_config)] = False,
) -> None:
    """Is what this server reuses right? The same requests cold, warm and cold again, and one verdict.

    Needs the server's public API alone, no plugin on it, and neither SGLang nor torch here. Sends about 430 short
    greedy requests; with `auto` they read nobody else's cache entries, and a cache that is full evicts some for them. A
    key is read from `SGLANG_PROBE_GATE_KEY`.

    Verdicts and exit codes: `EQUAL` 0, to the last bit; `WITHIN FLOOR` 10, not shown to be further apart than cold runs
    are; `REUSE CHANGES OUTPUTS` 11, further, by the size of rounding; `WRONG REUSE` 12, by more than rounding can: some
    entries are not those of their tokens; `INCONCLUSIVE` 13, with the reason, e.g. that warm requests got no answer or
    that a path says nothing. 2: an error.

    Writes `report.html`, `summary.json` and `tables/`.

    Example: `sglang-probe gate http://127.0.0.1:30000`
    """
    import json

    from rich.console import Console

    from sglang_probe.config import parse_config
    from sglang_probe.errors import ConfigError
    from sglang_probe.gate.client import Client
    from sglang_probe.gate.gate import PATHS, GateConfig, gate
    from sglang_probe.gate.launch import served
    from sglang_probe.gate.verdict import Verdict

    accepted = {None: [], "within-floor": [Verdict.WITHIN_FLOOR], "changes": [Verdict.WITHIN_FLOOR, Verdict.CHANGES]}
    if accept not in accepted:
        raise ConfigError(f"`--accept {accept}` is none", fix="`within-floor` or `changes`")
    if unknown := sorted(set(path or ()) - set(PATHS)):
        raise ConfigError(f"`--path {unknown[0]}` is none", fix=f"one of {', '.join(PATHS)}")
    given: dict[str, Any] = {"prompts": prompts, "cases": cases, "tokens": tokens, "new_tokens": new_tokens}
    given |= {"paths": path or list(PATHS), "company": company, "cold": cold, "seed": seed}
    config = parse_config(given, GateConfig, where="gate")
    console = Console(stderr=True)
    folder = output or Path("gate-" + "".join(c if c.isalnum() else "-" for c in server.split("//")[-1]).strip("-"))
    if (folder / REPORT).exists() and not overwrite:
        raise ConfigError(f"{folder} has a report already", fix="give another --output, or --overwrite")
    with console.status("asking the server") as status, served(server, status.update, _folder) as url:
        result = gate(
            Client(url),
            config,
            tell=lambda arm, done, of: status.update(f"{arm} ({done + 1} of {of})"),
            first=lambda j: console.print(f"so far: [bold]{j.verdict.value}[/]", highlight=False),
        )
    _write(result, folder)
    verdict = result.judgement.verdict
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1, allow_nan=False))
    else:
        _tell(result, folder, Console())
    raise typer.Exit(0 if verdict in accepted[accept] else verdict.exit_code)


def _folder(model: str) -> str:
    from sglang_probe.harvest.model import model_folder

    return model_folder(model)


def _write(result: Result, folder: Path) -> None:
    import json

    from sglang_probe.gate.page import gate_page
    from sglang_probe.report.page import TABLES, write

    (folder / TABLES).mkdir(parents=True, exist_ok=True)
    for name, frame in (("paths", result.judgement.paths), ("cases", result.judgement.cases)):
        frame.to_csv(folder / TABLES / f"{name}.csv", index=False)
    text = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
    (folder / SUMMARY).write_text(text, encoding="utf-8")
    write(gate_page(result), folder / REPORT)


def _tell(result: Result, folder: Path, console: Console) -> None:
    from sglang_probe.gate.page import failures_told, paths_table
    from sglang_probe.gate.verdict import Verdict
    from sglang_probe.report.terminal import print_table

    j = result.judgement
    if not j.paths.empty:
        print_table(console, paths_table(result))
    colour = {Verdict.EQUAL: "green", Verdict.WITHIN_FLOOR: "green", Verdict.WRONG: "red"}.get(j.verdict, "yellow")
    console.print(f"[bold {colour}]{j.verdict.value}[/]")
    console.print(j.sentence, markup=False, highlight=False, soft_wrap=True)
    for reason in j.reasons:
        console.print(f"note: {reason}", markup=False, highlight=False, soft_wrap=True)
    for failure in failures_told(result):
        console.print(f"failed: {failure}", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{result.requests:,} requests in {result.seconds:.0f} s; report: {folder / REPORT}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
