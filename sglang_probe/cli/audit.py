"""`sglang-probe audit`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sglang_probe.gate.audit import Audited

SHOWN = 8
"""Positions that an alarm names; the file has all."""


def command(
    server: Annotated[str, typer.Argument(help="Address of a server that records with `privacy: ids`.")],
    run: Annotated[Path, typer.Argument(help="The folder that it records into (`run:` of its configuration).")],
    output: Annotated[Path, typer.Option(help="JSONL: a line an audit, without anything of a prompt.")],
    share: Annotated[float, typer.Option(help="Share of the requests that reused something.")] = 0.02,
    tokens_per_minute: Annotated[
        float, typer.Option(help="Most tokens that twins may compute and take of the cache.")
    ] = 20_000,
    minutes: Annotated[float, typer.Option(help="How long; default: until Ctrl-C.")] = float("inf"),
    once: Annotated[bool, typer.Option(help="Audit the segments that are closed already, and end.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Recompute a share of what a live server reused, and compare: an alarm names the request that the entries are of.

    For each drawn request three twins (copies) are asked: one reuses the same entries, two compute everything. They are
    asked only while nothing is in flight, within a budget; the request itself is not touched. SGLang caches what it
    computes, so that each audit leaves two whole prompts in the cache that nobody asks again, and a full cache evicts
    entries of clients for them; the budget counts them.

    Log-probabilities after the reused prefix are compared. If the server hands out rows (`hook_points` and
    `asks: [rows]`), so are rows at each hook point: an alarm names the first layer that differs, and the positions. The
    rows that were recorded of the request itself are then compared with the computed ones as well.

    Needs closed segments of the recording (`segments: {max_seconds: 300}`) with token ids.

    A key is read from `SGLANG_PROBE_GATE_KEY`. Exit codes: 12 with an alarm; 13 if twins that reuse got no answer,
    where those that compute did, or if nothing could be judged; else 0.

    Example: `sglang-probe audit http://127.0.0.1:30000 runs/live --output audit.jsonl --share 0.05`
    """
    import json
    import time
    from collections import Counter
    from collections.abc import Callable, Iterator
    from dataclasses import asdict
    from functools import partial

    from rich.console import Console

    from sglang_probe.errors import ConfigError
    from sglang_probe.gate.arms import how_to_be_cold
    from sglang_probe.gate.audit import ALARMS, JUDGED, Auditor, Candidate, candidates, drawn, idle
    from sglang_probe.gate.client import Client
    from sglang_probe.run import seal
    from sglang_probe.run.manifest import MANIFEST
    from sglang_probe.run.run import load_run

    console = Console(stderr=True)
    client = Client(server)
    facts = client.facts()
    if not facts.probe:
        raise ConfigError(f"{server} does not record", fix="start it with SGLANG_PROBE=probe.yaml, `privacy: ids`")
    counts = Counter[str]()
    auditor: Auditor | None = None
    until = time.monotonic() + 60 * minutes

    def closed() -> Iterator[tuple[str, Callable[[], list[Candidate]]]]:
        for path in sorted(p.parent for p in run.glob(f"*/{MANIFEST}")):
            if seal.closed(json.loads((path / MANIFEST).read_text(encoding="utf-8"))):
                yield path.name, lambda path=path: candidates(load_run(path))  # type: ignore[misc]

    with output.open("a", encoding="utf-8") as out:
        for segment, one in drawn(closed, share=share, seed=seed, once=once, until=until):
            if auditor is None:
                auditor = Auditor(
                    client,
                    facts,
                    how_to_be_cold(client, one.prompt),
                    room=partial(idle, client),
                    tokens_per_minute=tokens_per_minute,
                    fetch=client.rows if facts.rows else None,
                    until=until,
                )
            said = auditor.audit(one)
            counts[said.found] += 1
            told = _finite({"segment": segment, **asdict(said)})
            out.write(json.dumps(told, allow_nan=False) + "\n")
            out.flush()
            if said.origins:
                console.print(in_words(said), markup=False)
    words = ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "nothing to audit"
    computed, filled = (auditor.computed, auditor.filled) if auditor else (0, 0)
    typer.echo(f"{words}; {computed:,} tokens computed, {filled:,} of the cache filled with what nobody asks again")
    unknown = counts["no answer"] or (counts and not any(counts[found] for found in JUDGED))
    if auditor is not None and auditor.without_rows:
        console.print(f"no rows came of {auditor.without_rows} twins: these were judged by log-probabilities alone")
    raise typer.Exit(12 if any(counts[found] for found in ALARMS) else 13 if unknown else 0)


def in_words(said: Audited) -> str:
    """One line of an alarm: what is wrong, where in the model, at which positions, and whose entries they are."""
    of = f"after {said.border} reused tokens, of {'; '.join(said.origins)}"
    if said.found == "no answer":
        return f"note: {said.rid}: no answer {of}"
    parts = [] if math.isnan(said.moved) else [f"log-probabilities by {said.moved:.3g} nats (T {said.threshold:.3g})"]
    if said.rows is not None and said.rows.past:
        at = [str(p) for p in said.rows.positions[:SHOWN]] + ["..."] * (len(said.rows.positions) > SHOWN)
        parts.append(
            f"rows by {said.rows.distance:.3g} of their length (T {said.rows.threshold:.3g}) from "
            f"{said.rows.hook_point} on, at positions {', '.join(at)}"
        )
    what = "was answered over wrong entries" if said.found == "was wrong" else "reuses wrong entries"
    return f"ALARM {said.rid} {what}: {'; '.join(parts)}; {of}"


def _finite(told: Any) -> Any:
    """For JSON: what is not finite is null."""
    if isinstance(told, dict):
        return {k: _finite(v) for k, v in told.items()}
    return None if isinstance(told, float) and not math.isfinite(told) else told
