"""Gates by a probe: every one that was asked was decided, on the prompt's last row, as its score says."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.run import schema
from sglang_probe.run.hook_points import SCORES, parse_hook_point
from sglang_probe.run.run import Run
from sglang_probe.run.scores import columns_of, read_weights
from sglang_probe.steering.spec import Spec
from sglang_probe.verify.check import Check
from sglang_probe.verify.interventions import asked_specs
from sglang_probe.verify.scores import TOLERANCE


def has_gates(run: Run) -> bool:
    """Whether anything in the run says that a gate was asked."""
    if not run.gates().empty:
        return True
    try:
        if any(Spec.from_json(json.loads(s)).probe is not None for s in run.interventions()["spec"].unique()):
            return True
        if "segment" in run.manifest or not run.manifest.get("steer"):
            return False
        return any(spec is not None and spec.probe is not None for _, (spec, _) in asked_specs(run))
    except (ProbeError, KeyError, TypeError, ValueError):
        return False  # which is what `interventions` says then


def gates_decided(run: Run) -> Check:
    """Every gate opened iff the score of its prompt's last row is above the threshold, and every gate was asked."""
    name = "gates"
    claim = "a gate opened iff the score of its prompt's last row is above the threshold; every one that was asked has"
    claim += " its decision, and every decision was asked for"
    gates = run.gates()
    computed = _last_rows(run.spans())
    compared = 0
    violation = None
    for g in gates.itertuples():
        violation = _wrong(run, g, computed.get((g.rid, g.attempt), []))
        if violation is None:
            violation, n = _of_its_row(run, g, computed.get((g.rid, g.attempt), []))
            compared += n
        if violation is not None:
            break
    violation = violation or _undecided(run, gates, computed)
    note = None
    if compared < len(gates):
        note = f"{compared} scores were compared with those of `{SCORES}` in this run; it has none of the others"
    return Check(name, claim, len(gates), "gates", violation, note)


_Computed = dict[tuple[str, int], list[tuple[int, int, int, int]]]
"""By request and attempt, computed spans of a prompt: start, end, forward pass, first row."""


def _last_rows(spans: pd.DataFrame) -> _Computed:
    found: _Computed = {}
    prompt = spans[(spans["status"] == schema.COMPUTED) & ~spans["phase"].isin(schema.STEP_PHASES)]
    for s in prompt.itertuples():
        found.setdefault((s.rid, s.attempt), []).append((s.start, s.end, s.forward_id, s.row_start))
    return found


def _wrong(run: Run, g: Any, computed: list[tuple[int, int, int, int]]) -> str | None:
    try:
        spec = Spec.from_json(json.loads(g.spec))
    except (KeyError, TypeError, ValueError) as e:
        return f"{g.rid}: what its gate is of cannot be read ({type(e).__name__}: {e})"
    if spec.id != g.intervention:
        return f"{g.rid}: what its gate is of has the hash {spec.id}, and it says {g.intervention}"
    probe = spec.probe
    if probe is None:
        return f"{g.rid}: a gate was decided, and its interventions have none"
    if (probe.name, probe.hook_point, np.float32(probe.threshold)) != (g.probe, g.hook_point, np.float32(g.threshold)):
        return f"{g.rid}: its gate is by another probe than it asked for"
    told = ((run.manifest.get("steer") or {}).get("vectors") or {}).get(probe.name)
    if told is not None and (told["hash"], told.get("threshold")) != (probe.hash, probe.threshold):
        return f"{g.rid}: its gate is by another `{probe.name}` than the one of the manifest"
    if bool(g.opened) != bool(g.score > g.threshold):
        said = "opened" if g.opened else "stayed closed"
        return f"{g.rid}: its gate {said} at a score of {g.score:.6g} and a threshold of {g.threshold:.6g}"
    at = [forward for a, b, forward, _ in computed if a <= g.position < b]
    if g.forward_id >= 0 and at and at[0] != g.forward_id:
        return f"{g.rid}: its gate was decided in forward {g.forward_id}, and its row was computed in {at[0]}"
    if g.forward_id >= 0 and not at and "segment" not in run.manifest:
        return f"{g.rid}: its gate was decided on position {g.position}, which it did not compute"
    return None


def _of_its_row(run: Run, g: Any, computed: list[tuple[int, int, int, int]]) -> tuple[str | None, int]:
    """The score against the one that was written at `hook_scores`, where there is one of this probe and row."""
    point = f"blocks.{parse_hook_point(g.hook_point).layer}.{SCORES}"
    if point not in run.hook_points or g.probe not in (names := columns_of(run, point)):
        return None, 0
    row = next((r + g.position - a for a, b, _, r in computed if a <= g.position < b and r >= 0), None)
    if row is None or not run.holds(point, np.array([row]))[0]:
        return None, 0
    x_K = run.rows(point, [row])[0]
    written = float(x_K[names.index(g.probe)])
    weights = read_weights(run)
    # As two sums of the same products in different orders may differ (`verify.scores`).
    length = 1.0 if weights is None else float(weights[g.probe].norm())
    beside = g.hook_point
    norm = float(run.rows(beside, [row])[0].float().norm()) if beside in run.hook_points else abs(written) / length
    if abs(written - g.score) > TOLERANCE * max(norm * length, abs(written)):
        return f"{g.rid}: its gate has a score of {g.score:.6g}, and the row has {written:.6g}", 0
    return None, 1


def _undecided(run: Run, gates: pd.DataFrame, computed: _Computed) -> str | None:
    """A request that asked for a gate, computed the row that decides it, and has no decision."""
    asked = {str(r.rid): _probe_of(r.spec, int(r.prompt_len)) for r in run.interventions().itertuples()}
    of_prompt = {rid: n for rid, n in asked.items() if n is not None}
    if "segment" not in run.manifest and run.manifest.get("steer"):
        try:
            for rid, (spec, n) in asked_specs(run):
                if spec is not None and spec.probe is not None and spec.onset(n) is not None:
                    of_prompt[rid] = n
                elif rid in set(gates["rid"]):
                    return f"{rid}: it asked for no gate, and has a decision"
        except ProbeError as e:
            return e.message
    decided = set(gates["rid"])
    for rid in run.budget()["rid"].dropna():
        of_prompt.pop(rid, None)
    wrong = dict(zip(gates["rid"], gates["position"], strict=True))
    for rid, n in of_prompt.items():
        if rid in decided:
            if wrong[rid] != n - 1:
                return f"{rid}: its gate was decided on position {wrong[rid]}, and its prompt ends at {n - 1}"
            continue
        if any(who == rid and a < n <= b for (who, _), spans in computed.items() for a, b, _, _ in spans):
            return f"{rid}: it asked for a gate and computed the row that decides it, and has no decision"
    return None


def _probe_of(spec: str, prompt_len: int) -> int | None:
    """Length of the prompt of a gated specification."""
    return prompt_len if Spec.from_json(json.loads(spec)).probe is not None else None
