"""Interventions: every position is marked as its request's plan says, and no entry is reused under another history."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.ask import recorded_steer
from sglang_probe.config import parse_config
from sglang_probe.errors import ProbeError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import Spec, joined
from sglang_probe.verify.check import Check

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Under:
    """A request's interventions, as the ledger has them."""

    id: str
    spec: Spec
    """What was done: of a gated one, what its gate left."""
    prompt_len: int
    onset: int


def has_interventions(run: Run) -> bool:
    """Whether anything in the run says that there were any."""
    m = run.manifest
    if m.get("steer") or (m.get("policy") or {}).get("steer") or m.get("positions_intervened", 0) != 0:
        return True
    marked = bool(run.spans()["intervention"].notna().any())
    return marked or not run.interventions().empty or not run.gates().empty


def marked_as_planned(run: Run) -> Check:
    """A position is marked iff its request's interventions began at it or before; reuse is of equal histories."""
    name = "interventions"
    claim = (
        "a position is marked iff an intervention of its request reached it, and what was reused was written under the "
        "same interventions as it would have been"
    )
    spans = run.spans()
    covered = int((spans["end"] - spans["start"])[spans["intervention"].notna()].sum())
    under: dict[str, _Under] = {}
    violation = _read(run, under)
    violation = violation or _computed(spans, under) or _shared(spans, under, "reused")
    violation = violation or _shared(run.rebinds().assign(intervention=None), under, "rebound")
    counted = run.manifest.get("positions_intervened", covered)
    if violation is None and counted != covered:
        violation = f"{covered} positions are marked, and the manifest counted {counted}"
    note = None
    if violation is None:
        violation, note = _as_asked(run, under)
    return Check(name, claim, covered, "positions", violation, note)


def _read(run: Run, under: dict[str, _Under]) -> str | None:
    ended = run.engine_requests().drop_duplicates("rid").set_index("rid")["prompt_len"]
    opened = dict(zip((gates := run.gates())["rid"], gates["opened"], strict=True))
    for r in run.interventions().itertuples():
        try:
            spec = Spec.from_json(json.loads(r.spec))
        except (KeyError, TypeError, ValueError) as e:
            return f"{r.rid}: its interventions cannot be read ({type(e).__name__}: {e})"
        if spec.id != r.intervention:
            return f"{r.rid}: its interventions have the hash {spec.id}, and it says {r.intervention}"
        # Undecided, it computed its prompt at most, where a gate changes nothing.
        done = spec.decided(bool(opened.get(r.rid, False))) or Spec(())
        if done.onset(r.prompt_len) != r.onset:
            return f"{r.rid}: its interventions begin at {done.onset(r.prompt_len)}, and it says {r.onset}"
        if r.rid in ended.index and ended[r.rid] != r.prompt_len:
            return f"{r.rid}: its prompt has {ended[r.rid]} tokens, and its interventions are of one of {r.prompt_len}"
        under[r.rid] = _Under(spec.id, done, int(r.prompt_len), int(r.onset))
    return None


def _computed(spans: pd.DataFrame, under: Mapping[str, _Under]) -> str | None:
    """Marks of what each request computed itself, against its own plan; everything else but reuse has none."""
    onset = spans["rid"].map({rid: u.onset for rid, u in under.items()}).fillna(np.inf).to_numpy()
    name = spans["rid"].map({rid: u.id for rid, u in under.items()})
    start, end = spans["start"].to_numpy(), spans["end"].to_numpy()
    computed = (spans["status"] == schema.COMPUTED).to_numpy()
    marked = spans["intervention"].notna().to_numpy()
    faults = {
        "an intervention begins within it": computed & (start < onset) & (onset < end),
        "it is marked, and no intervention of its request had reached it": computed & marked & (start < onset),
        "an intervention of its request had reached it, and it is not marked": computed & ~marked & (start >= onset),
        "it is marked as under another intervention than its request's": computed
        & marked
        & (spans["intervention"] != name).to_numpy(),
        "it was neither computed nor reused, and is marked": marked
        & ~spans["status"].isin((schema.COMPUTED, schema.REUSED)).to_numpy(),
    }
    return _first(spans, faults)


def _shared(spans: pd.DataFrame, under: Mapping[str, _Under], what: str) -> str | None:
    """What was reused, or came in the place of an own entry, against both plans: that of the request and the origin's.

    An entry depends on every position up to its own, so that the histories up to the end of the span must be equal.
    """
    known = spans[spans["origin_rid"].notna()]
    if what == "reused":
        known = known[known["status"] == schema.REUSED]
        nameless = spans[(spans["status"] == schema.REUSED) & spans["origin_rid"].isna()]
        known = pd.concat([known, nameless])
    concerned = known["rid"].isin(under) | known["origin_rid"].isin(under) | known["intervention"].notna()
    plain = Spec(())
    for s in known[concerned].itertuples():
        mine, theirs = under.get(s.rid), under.get(s.origin_rid)
        where = f"{s.rid} positions {s.start} to {s.end}, {what} from {s.origin_rid}"
        if what == "reused":
            expected = theirs.id if theirs is not None and s.start >= theirs.onset else None
            found = s.intervention if isinstance(s.intervention, str) else None
            if isinstance(s.origin_rid, str) and found != expected:
                return f"{where}: written under {expected or 'no intervention'}, and marked as under {found or 'none'}"
            if theirs is not None and s.start < theirs.onset < s.end:
                return f"{where}: an intervention of its origin begins within it"
        (a, n), (b, m) = ((plain, 0) if u is None else (u.spec, u.prompt_len) for u in (mine, theirs))
        if a.history(n, s.end) != b.history(m, s.end):
            told = [f"`{u.id}`" if u is not None and u.onset < s.end else "none" for u in (mine, theirs)]
            return f"{where}: its interventions up to there are {told[0]}, and its origin's were {told[1]}"
    return None


def _as_asked(run: Run, under: Mapping[str, _Under]) -> tuple[str | None, str | None]:
    """What the ledger says each request ran under, against what it asked and the library in the manifest."""
    m = run.manifest
    if "segment" in m or m.get("steer") is None:
        return None, "what requests asked is not in this run, so that their interventions are taken from the ledger"
    try:
        specs = dict(asked_specs(run))
    except ProbeError as e:
        return e.message, None
    # One that was in flight when an engine died is asked again as `<rid>~<n>`.
    ran = {rid.partition("~")[0]: u.id for rid, u in under.items()}
    # Closed, it ran as if it had not asked; and it may have ended before what waited for its gate.
    gates = run.gates()
    ran |= {rid.partition("~")[0]: name for rid, name in zip(gates["rid"], gates["intervention"], strict=True)}
    budget = run.budget()
    unsteered = {str(rid).partition("~")[0]: i for rid, i in zip(budget["rid"], budget["intervention"], strict=True)}
    for name, (spec, prompt_len) in specs.items():
        rid = name.partition("~")[0]
        asked = spec.id if spec is not None and spec.onset(prompt_len) is not None else None
        if asked is not None and asked == unsteered.get(rid):
            continue  # whether that could be is asked of `budget`
        if spec is not None and spec.probe is not None and rid not in ran:
            continue  # whether it should have been decided is asked of `gates`
        if ran.get(rid) != asked:
            return f"{name}: it asked for {asked or 'no intervention'}, and ran under {ran.get(rid) or 'none'}", None
    return None, None


def asked_specs(run: Run) -> Iterator[tuple[str, tuple[Spec | None, int]]]:
    """Of each request that was served, what it asked for by `requests.parquet` and the manifest (None: nothing), and
    the length of its prompt. Not of a live segment, which does not have it.

    Raises:
        ProbeError: what it asked cannot be read, or needs what the library of the manifest does not have.
    """
    m = run.manifest
    library = {name: _Vector(v) for name, v in m["steer"]["vectors"].items()}
    of_all = spec_of(_read_entries(m["steer"]["deployment"]), library, where="deployment")
    arm = _read_entries((m.get("policy") or {}).get("steer") or ())
    served = {rid.partition("~")[0] for rid in run.spans()["rid"].unique()}
    for r in run.requests(interrupted=True).itertuples():
        if r.finish_reason == schema.REFUSED or r.rid.partition("~")[0] not in served:
            continue
        own = spec_of((*recorded_steer(r.sampling_params), *arm), library, where=f"{r.rid}: steer")
        yield r.rid, (joined(of_all, own), int(r.prompt_len))


def _read_entries(given: Any) -> tuple[Steer, ...]:
    return tuple(parse_config(dict(e), Steer, where="deployment") for e in given)


@dataclass(frozen=True)
class _Vector:
    """A vector of the manifest's library: what `spec_of` reads of it."""

    told: Mapping[str, Any]

    @property
    def hash(self) -> str:
        return str(self.told["hash"])

    @property
    def card(self) -> Any:
        return _Card(**{k: v for k, v in self.told.items() if k not in ("hash", "threshold")})

    @property
    def threshold(self) -> float | None:
        return self.told.get("threshold")


@dataclass(frozen=True)
class _Card:
    kind: str
    hook_point: str
    norm: float
    layer_mean_norm: float | None
    percentile99: float | None


def _first(spans: pd.DataFrame, faults: Mapping[str, Array]) -> str | None:
    for what, bad in faults.items():
        if bad.any():
            s = spans.iloc[int(np.argmax(bad))]
            return f"{s['rid']} positions {s['start']} to {s['end']}: {what}"
    return None
