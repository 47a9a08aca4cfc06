"""`sglang-probe audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    server: Annotated[str, typer.Argument(help="Address of a server that records with `privacy: ids`.")],
    run: Annotated[Path, typer.Argument(help="The folder that it records into (`run:` of its configuration).")],
    output: Annotated[Path, typer.Option(help="JSONL: a line an audit, without anything of a prompt.")],
    share: Annotated[float, typer.Option(help="Of the requests that reused something.")] = 0.02,
    tokens_per_minute: Annotated[float, typer.Option(help="What twins may compute.")] = 20_000,
    minutes: Annotated[float, typer.Option(help="How long; default: until Ctrl-C.")] = float("inf"),
    once: Annotated[bool, typer.Option(help="Audit the segments that are closed already, and end.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Recompute a share of what a live server reused, and compare: an alarm names the request that the entries are of.

    For each drawn request three twins are asked, one that reuses the same entries and two that compute everything. They
    are asked only while nothing is in flight, within a budget; the request itself is not touched. Needs closed segments
    of the recording (`segments: {max_minutes: 5}`) with token ids.

    A key is read from `SGLANG_PROBE_GATE_KEY`. Exit code 0 without an alarm, 12 with one.

    Example: `sglang-probe audit http://127.0.0.1:30000 runs/live --output audit.jsonl --share 0.05`
    """
    import json
    import random
    import time
    from collections import Counter
    from dataclasses import asdict

    from rich.console import Console

    from sglang_probe.errors import ConfigError
    from sglang_probe.gate.arms import how_to_be_cold
    from sglang_probe.gate.audit import Auditor, candidates, idle
    from sglang_probe.gate.client import Client
    from sglang_probe.run import seal
    from sglang_probe.run.manifest import MANIFEST
    from sglang_probe.run.run import load_run

    console = Console(stderr=True)
    client = Client(server)
    facts = client.facts()
    if not facts.probe:
        raise ConfigError(f"{server} does not record", fix="start it with SGLANG_PROBE=probe.yaml, `privacy: ids`")
    rng, seen, counts = random.Random(seed), set[str](), Counter[str]()
    auditor: Auditor | None = None
    end = time.monotonic() + 60 * minutes
    with output.open("a", encoding="utf-8") as out:
        while True:
            for path in sorted(p.parent for p in run.glob(f"*/{MANIFEST}")):
                if path.name in seen or not seal.closed(json.loads((path / MANIFEST).read_text(encoding="utf-8"))):
                    continue
                seen.add(path.name)
                for one in (c for c in candidates(load_run(path)) if rng.random() < share):
                    if auditor is None:
                        cold = how_to_be_cold(client, one.prompt)
                        room = lambda: idle(client)  # noqa: E731
                        auditor = Auditor(client, facts, cold, room=room, tokens_per_minute=tokens_per_minute)
                    said = auditor.audit(one)
                    counts[said.found] += 1
                    told = {k: None if v != v else v for k, v in asdict(said).items()}
                    out.write(json.dumps({"segment": path.name, **told}, allow_nan=False) + "\n")
                    out.flush()
                    if said.found == "wrong":
                        of = "; ".join(said.origins)
                        console.print(
                            f"ALARM {said.rid}: {said.moved:.3g} nats after {said.border} reused tokens, of {of}",
                            markup=False,
                        )
                    if time.monotonic() > end:
                        break
            if once or time.monotonic() > end:
                break
            time.sleep(2)
    computed = auditor.computed if auditor else 0
    words = ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "nothing to audit"
    typer.echo(f"{words}; {computed:,} tokens computed")
    raise typer.Exit(12 if counts["wrong"] else 0)
