"""The dataset card of a run: what it holds, what it does not, and how to read it."""

from __future__ import annotations

import json
from typing import Any

from sglang_probe.errors import LedgerError
from sglang_probe.report import markdown
from sglang_probe.report.numbers import format_number
from sglang_probe.run import journal, seal
from sglang_probe.run.run import Run
from sglang_probe.run.selection import Selected
from sglang_probe.studies.coverage.prompts import coverage_by_segment, totals
from sglang_probe.studies.coverage.study import study_coverage
from sglang_probe.studies.coverage.words import paragraph

_CARD = """# {name}

{status} Recorded by sglang-probe {probe} on SGLang {sglang}, {created}.

| | |
|---|---|
| model | {model} ({architecture}), rows in {dtype} |
| arm | {arm}: {policy} |
| requests | {requests} of {expected} |
| hook points | {hook_points} |
| rows | {rows:,}, {dropped} dropped |
| prompt tokens | {prompt_tokens:,}: {computed:,} computed, {reused:,} reused from the prefix cache |
| generated tokens | {generated:,} |

## Coverage of prompt tokens

{coverage}

A reused position has no captured row: the engine skipped its forward pass. Positions whose coverage is low are
under-sampled in the rows of this run relative to traffic. `sglang-probe coverage` has other classes of tokens, the bias
of each, and weights that correct it.

{methods}

## Known gaps

{gaps}

## Personal data

Token ids of prompts and outputs are stored in `requests.parquet`, and rows can be inverted to text in part. Treat this
directory like the text it came from.

## Reading it

```python
import sglang_probe
run = sglang_probe.load_run("{path}")
tokens = run.tokens()                       # one row per position: status, phase, segment, forward pass, row
held = tokens[run.holds("{first_hook}", tokens["row"]) & tokens["intervention"].isna()]
rows = run.rows("{first_hook}", held["row"])
```
"""


CARD = "README.md"
"""Name of the card in a run directory."""


def write_card(run: Run) -> None:
    """Write `README.md` into the run directory."""
    m = run.manifest
    t = totals(run)
    text = _CARD.format(
        name=markdown.escape(m["name"]),
        status="Complete." if run.complete else "**Incomplete.**",
        probe=markdown.escape(m["versions"]["sglang-probe"]),
        sglang=markdown.escape(m["versions"]["sglang"]),
        created=markdown.escape(m["created"]),
        model=markdown.escape(m["model"]["name"]),
        architecture=markdown.escape(m["model"]["architecture"]),
        dtype=markdown.escape(m["rows_dtype"] or m["dtype"]),
        arm=markdown.escape(m["arm"]),
        policy=markdown.code(m["policy"]),
        requests=int(t["requests"]),
        expected=m["requests_expected"],
        hook_points=", ".join(map(markdown.code, run.hook_points)) or "none",
        rows=m["rows"],
        dropped=m["rows_dropped"],
        prompt_tokens=int(t["prompt_tokens"]),
        computed=int(t["computed"]),
        reused=int(t["reused"]),
        generated=int(t["generated"]),
        coverage=segments_table(run),
        methods=_methods(run),
        gaps=_gaps(m, t),
        path=_in_string(run.path.name),
        first_hook=run.hook_points[0] if run.hook_points else "hook_embed",
    )
    journal.write_text_durably(run.path / CARD, text)
    seal.add(run.path, CARD)


def segments_table(run: Run) -> str:
    """Coverage by segment of the prompt as a Markdown table."""
    found = coverage_by_segment(run.iter_tokens())
    counts = ["positions", "computed", "reused"]
    rows = [
        [markdown.code(r["segment"]), *(f"{r[c]:,}" for c in counts), format_number(r["coverage"], "percent")]
        for r in found.to_dict("records")
    ]
    return markdown.table(["segment", *counts, "coverage"], rows, numeric=4)


def _methods(run: Run) -> str:
    try:
        return paragraph(study_coverage(run), markdown.code)
    except LedgerError as e:
        return f"**The coverage of this run cannot be counted: {markdown.escape(e.message)}.**"


def _in_string(name: str) -> str:
    """The name inside of a Python string in a fenced block, which no sign of it may end."""
    return json.dumps(name)[1:-1].replace("`", "\\x60")


def _gaps(manifest: dict[str, Any], t: dict[str, float]) -> str:
    gaps = ["the last sampled token of a request has no KV entry and no row"]
    if t["overshoot"]:
        gaps.append(f"{int(t['overshoot'])} discarded decode steps (overshoot) have rows and no output token")
    if t["recomputed"]:
        gaps.append(f"{int(t['recomputed'])} positions were computed again after a retraction")
    if manifest.get("kept"):
        gaps.append(
            "rows of requests with a kept set (`evict` in `requests.parquet`) come from a compressed cache from "
            "position `cache_len` on"
        )
    if intervened := manifest.get("positions_intervened"):
        gaps.append(
            f"{intervened} positions were computed or reused under an intervention on the residual stream (column "
            "`intervention`): their rows are not those of the plain model, and `iter_batches` and `activations` leave "
            "them out unless told `intervened=True`"
        )
    if manifest["lines_skipped"]:
        reasons = (manifest.get("skipped_by_reason") or {}).items()
        why = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons, key=lambda x: -x[1]))
        gaps.append(f"{manifest['lines_skipped']} records of the workload were skipped" + (f": {why}" if why else ""))
    if refused := manifest.get("refused"):
        gaps.append(
            f"{len(refused)} requests were refused by SGLang (`finish_reason: refused`; `refusal` says why): complete "
            "means that every request was served or refused"
        )
    if manifest["status"] != "complete":
        gaps.append(markdown.escape(manifest.get("fault") or "the run was interrupted"))
    partial = Selected.from_manifest(manifest).partial
    if partial:
        named = ", ".join(map(markdown.code, partial))
        gaps.append(f"{named} hold rows of the selected positions only (`rows_kept` in the manifest)")
    return "\n".join(f"* {g}" for g in gaps)
