"""Coverage recomputed from the files alone, one position after the other. Shares no code with the package."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq


def naive(path: Path, class_of) -> dict:
    """`class_of(request, position, token)` names a class. Returns counts by class and the multiplicity of rows."""
    parts = [json.loads(line)["files"] for line in (path / "journal.jsonl").read_text().splitlines()]
    spans = [s for files in parts for f in files if "/spans-" in f for s in pq.read_table(path / f).to_pylist()]
    requests = [r for r in pq.read_table(path / "requests.parquet").to_pylist() if r["finish_reason"] != "interrupted"]
    in_run = {
        (s["rid"], s["attempt"], p) for s in spans if s["status"] == "computed" for p in range(s["start"], s["end"])
    }
    fates, contexts, uses = defaultdict(Counter), {}, Counter()
    for r in requests:
        ids = [*r["prompt_ids"], *(r["output_ids"] or [])]
        mine = [s for s in spans if s["rid"] == r["rid"]]
        last = max((s["attempt"] for s in mine), default=0)
        for s in sorted(mine, key=lambda s: s["start"]):
            if s["attempt"] != last or s["phase"] == "overshoot":
                continue
            for p in range(s["start"], s["end"]):
                name = class_of(r, p, ids[p])
                fates[name][s["status"]] += 1
                origin = (s["origin_rid"], s["origin_attempt"], p)
                has = s["status"] == "computed" or (s["status"] == "reused" and origin in in_run)
                first, before = contexts.get(tuple(ids[: p + 1]), (name, False))
                contexts[tuple(ids[: p + 1])] = (first, has or before)
                if s["status"] == "computed":
                    uses[r["rid"], last, p, name] += 1
                elif s["status"] == "reused" and origin[0] is not None:
                    uses[*origin, None] += 1
    unique, have, multiplicity = Counter(), Counter(), defaultdict(Counter)
    for name, has in contexts.values():
        unique[name] += 1
        have[name] += has
    for (rid, attempt, p, name), n in uses.items():
        if name is not None:
            multiplicity[name][n + uses[rid, attempt, p, None]] += 1
    return {"fates": fates, "contexts": unique, "contexts_in_run": have, "multiplicity": multiplicity}
