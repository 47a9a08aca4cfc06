"""Whether every cell of the ledger holds a value that its column can have, given the others of its row."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.run import schema, seal
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check

_STATUSES = (schema.COMPUTED, schema.REUSED, schema.DROPPED, schema.UNREQUESTED)
_PROMPT_PHASES = (schema.PREFILL, schema.RECOMPUTE)


def cells_are_possible(run: Run) -> Check:
    """Each row of spans, forwards, rebinds and requests says something that can be."""
    name, claim = "cells", "every cell of the ledger holds a value that its column can have beside the others"
    spans, forwards, rebinds, ended = run.spans(), run.forwards(), run.rebinds(), run.engine_requests()
    covered = len(spans) + len(forwards) + len(rebinds) + len(ended) + len(run.tree())
    violation = (
        _first(spans, _span_faults(run, spans), lambda s: f"span {s['rid']} {s['start']} to {s['end']}")
        or _first(forwards, _forward_faults(run, forwards), lambda f: f"forward {f['forward_id']}")
        or _first(rebinds, _rebind_faults(rebinds), lambda r: f"rebind of {r['rid']} {r['start']} to {r['end']}")
        or _first(ended, _request_faults(ended), lambda r: f"request {r['rid']}")
    )
    return Check(name, claim, covered, "rows", violation)


def _first(frame: pd.DataFrame, faults, where) -> str | None:  # type: ignore[no-untyped-def]
    for what, bad in faults.items():
        bad = np.asarray(bad, dtype=bool)
        if bad.any():
            return f"{where(frame.iloc[int(np.argmax(bad))])}: {what}"
    return None


def _span_faults(run: Run, s: pd.DataFrame) -> dict[str, pd.Series]:
    computed, reused = s["status"] == schema.COMPUTED, s["status"] == schema.REUSED
    dropped, nowhere = s["status"] == schema.DROPPED, s["status"] == schema.UNREQUESTED
    step, prompt = s["phase"].isin(schema.STEP_PHASES), s["phase"].isin(_PROMPT_PHASES)
    length, rows = s["end"] - s["start"], bool(run.hook_points)
    no_row = (s["row_start"] == -1) & (s["row_step"] == 0)
    has_row = (s["row_start"] >= 0) & (s["row_step"] > 0) & ((s["row_step"] == 1) | step)
    has_row &= (s["row_step"] == 1) | (length > 1)
    named = s["origin_rid"].notna()
    whole = segment.of(run) is None
    return {
        "it holds no position": (s["start"] < 0) | (length <= 0),
        f"status is none of {', '.join(_STATUSES)}": ~s["status"].isin(_STATUSES),
        "attempt is negative": s["attempt"] < 0,
        "facts are dropped by live recordings only": dropped & whole,
        "computed, and in no phase": computed & ~(step | prompt),
        "not computed, and in a phase": (reused | nowhere) & s["phase"].notna(),
        "computed by no forward pass": (computed | reused) & (s["forward_id"] < 0),
        "never computed, and has a forward pass": nowhere & (s["forward_id"] != -1),
        "a decode step is in no chunk of a prefill": computed & step & (s["chunk"] != -1),
        "a part of a prefill has no number": ((computed & prompt) | reused) & (s["chunk"] < 0),
        "never computed, and in a chunk": nowhere & (s["chunk"] != -1),
        "tier is not `device`": reused & (s["tier"] != "device"),
        "not reused, and in a tier": ~reused & s["tier"].notna(),
        "it has rows, and this run captured none" if not rows else "computed, and without rows": computed
        & ~(has_row if rows else no_row),
        "not computed, and with rows": (reused | nowhere) & ~no_row,
        "not reused, and with an origin": ~reused & (named | s["origin_attempt"].notna()),
        "origin without an attempt, or an attempt without an origin": reused & (named != s["origin_attempt"].notna()),
        "attempt of its origin is negative": reused & (s["origin_attempt"] < 0),
    }


def _forward_faults(run: Run, f: pd.DataFrame) -> dict[str, pd.Series]:
    added = f[list(schema.ADDED["forwards"])]
    older = run.manifest["schema_version"] < seal.SINCE_SCHEMA
    told = [w["number"] for w in run.manifest.get("weights", [{"number": 0}])]
    of_weights = f["weights"].fillna(0)
    # An engine that died may not have told of its last update.
    named = of_weights.isin(told) if run.complete else of_weights >= 0
    counts = ("requests", "prefill_tokens", "decode_tokens", "slots", "waiting", "forward_id")
    prefill, decode = f["prefill_tokens"], f["decode_tokens"]
    return {
        "mode is none of extend, mixed, decode": ~f["mode"].isin(("extend", "mixed", "decode")),
        "a count is negative": (f[list(counts)] < 0).any(axis=1),
        "it is of no request": f["requests"] < 1,
        "prefill and decode tokens do not sum to its slots": (prefill + decode != f["slots"])
        & (f["unaccounted"].fillna(0) == 0),
        "mode `decode` with tokens of a prefill": (f["mode"] == "decode") & (prefill > 0),
        "mode `extend` with tokens of decoding": (f["mode"] == "extend") & (decode > 0),
        "a prefill without tokens": (f["mode"] != "decode") & (prefill < 1),
        "row_start is below -1": f["row_start"] < -1,
        "its time is not a number": ~np.isfinite(f["launched"]) | ~np.isfinite(f["seconds"]),
        "it took less than no time": f["seconds"] < 0,
        "`unaccounted` or `weights` has no value": added.isna().any(axis=1) & (not older),
        "fewer slots than positions that could not be accounted for": f["unaccounted"] > f["slots"],
        "it ran with weights that the manifest does not name": ~named,
        "it ran with earlier weights than the one before it": f.groupby("dp_rank")["weights"].diff() < 0,
    }


def _rebind_faults(r: pd.DataFrame) -> dict[str, pd.Series]:
    named = r["origin_rid"].notna()
    return {
        "it holds no position": (r["start"] < 0) | (r["end"] <= r["start"]),
        "attempt is negative": (r["attempt"] < 0) | (r["origin_attempt"] < 0),
        "forward is negative": r["at_forward"] < 0,
        "origin without an attempt, or an attempt without an origin": named != r["origin_attempt"].notna(),
        "it is rebound to itself": named & (r["origin_rid"] == r["rid"]) & (r["origin_attempt"] == r["attempt"]),
    }


def _request_faults(q: pd.DataFrame) -> dict[str, pd.Series]:
    given = q["output_ids"].notna()
    lengths = q["output_ids"].map(len, na_action="ignore").fillna(-1)
    return {
        "a count is negative": (q[["prompt_len", "output_len", "cached_tokens", "retractions"]] < 0).any(axis=1),
        "SGLang reused more than the prompt": q["cached_tokens"] > q["prompt_len"],
        "output_len is not the length of its output": given & (lengths != q["output_len"]),
        "its finish reason is that of a request without an end": q["finish_reason"].isin(segment.WITHOUT_END),
    }
