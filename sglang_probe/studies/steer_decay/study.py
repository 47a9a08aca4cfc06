"""What the runs say of the dose at each onset: effect, side effect, what remains after it, and whether it decays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.steering.library import Library
from sglang_probe.studies.base import records
from sglang_probe.studies.steer_decay.config import SteerDecayConfig
from sglang_probe.studies.steer_decay.later import downstream, probed, text_path
from sglang_probe.studies.steer_decay.names import FORCED, FREE, NOTHING, PLAIN, REREAD, SOURCES, named
from sglang_probe.studies.steer_decay.statistics import (
    RANDOM,
    VECTOR,
    ZERO,
    after_curves,
    decay,
    effects,
    half_lives,
    per_family,
)
from sglang_probe.studies.steer_decay.target import lens_tokens, log_odds, token_ids
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid

Array = np.ndarray[Any, Any]
_BLOCK = 256


@dataclass(frozen=True)
class SteerDecayResult:
    """Everything the report and the terminal show; frames are tidy."""

    name: str
    effects: pd.DataFrame
    """`statistics.effects`; the arm `zero dose` is the floor: the same tokens under a strength of 0."""
    decay: pd.DataFrame
    """`statistics.decay` of the shift."""
    decay_kl: pd.DataFrame
    """The same of the KL."""
    after: pd.DataFrame
    half_lives: pd.DataFrame
    free: pd.DataFrame
    """`arm, onset, excess, excess_low, excess_high, plain`: share of target tokens over that of the plain model,
    free-running."""
    downstream: pd.DataFrame
    """`source, arm, onset, activation, low, high, after, plain`: rise of the activation of the features of a later
    layer, within the window and after it, with the interval of the first; and what it is in the plain model. Empty
    without `downstream`."""
    probe: pd.DataFrame
    """`arm, onset, fires, fires_low, fires_high, score, ..., plain`: over the plain model's text, of what an arm wrote
    by itself in its window: share of rows on which the held-out probe fires, and its score; read without steering.
    Empty without `probe`."""
    text: pd.DataFrame
    """`later.text_path`. Empty without `probe`, whose run it reads."""
    steps: pd.DataFrame
    before: float
    """Largest KL of a step before an onset: nothing was steered there."""
    targets: Mapping[str, list[int]]
    families: int
    checks: dict[str, list[Check]]
    manifest: dict[str, Any]
    config: SteerDecayConfig
    judged: pd.DataFrame = field(default_factory=pd.DataFrame)
    """`judge.judged`; empty without `--judge`."""
    judge: Mapping[str, Any] | None = None
    """Who judged: model, hash of its weights where known, hash of the questions."""

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        c = self.config
        return {
            "name": self.name,
            "vector": c.vector,
            "random": c.random,
            "strength": c.strength,
            "unit": c.unit,
            "window": c.window,
            "onsets": c.onsets,
            "families": self.families,
            "targets": dict(self.targets),
            "largest_kl_before_onsets": self.before,
            "judge": self.judge,
            **{k: records(frame) for k, frame in self.tables().items() if k != "steps"},
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table."""
        names = ["effects", "decay", "decay_kl", "after", "half_lives", "free", "downstream", "probe", "text"]
        names += ["judged", "steps"]
        return {k: getattr(self, k) for k in names}


def study_decay(
    runs: Mapping[str, Run], config: SteerDecayConfig, name: str, *, tell: Callable[[str], None] = lambda _: None
) -> SteerDecayResult:
    """Measure the dose.

    Raises:
        ProbeError: a step of a request has no row, or the model's unembedding cannot be read.
        ConfigError: the library is another one than that of the runs.
    """
    checks = {}
    for run_name, run in runs.items():
        tell(f"verifying {run_name}")
        checks[run_name] = verify(run)
    forced = runs[FORCED]
    model = Path(forced.manifest["model_path"])
    unembedding = load_unembedding(model)
    assert config.steer is not None
    library = Library.open(config.steer.library)
    vector = library[config.vector].vector
    if config.target is None:
        positive, negative = lens_tokens(vector, unembedding, config.lens)
    else:
        positive, negative = (token_ids(model, t) for t in (config.target.positive, config.target.negative))
    tell("comparing predictions")
    at = _places(forced, config)
    measured = _measure(forced, at, unembedding, vector, positive, negative, tell)
    steps = measured[measured["offset"] >= 0].reset_index(drop=True)
    before = measured.loc[measured["offset"] < 0, "kl"]
    families = per_family(steps, config.window)
    return SteerDecayResult(
        name=name,
        effects=effects(families),
        decay=decay(families),
        decay_kl=decay(families, "kl"),
        after=after_curves(steps, config.window),
        half_lives=half_lives(steps, config.window),
        free=_free(runs[FREE], config, positive) if FREE in runs else pd.DataFrame(),
        downstream=downstream(forced, at, config),
        probe=probed(runs[REREAD], library, config) if REREAD in runs else pd.DataFrame(),
        text=text_path(runs[REREAD], unembedding, config, positive, negative) if REREAD in runs else pd.DataFrame(),
        steps=steps.drop(columns=["row", "plain"]),
        before=float(before.max()) if len(before) else 0.0,
        targets={"positive": positive, "negative": negative},
        families=int(steps["family"].nunique()),
        checks=checks,
        manifest=forced.manifest,
        config=config,
    )


def _places(run: Run, config: SteerDecayConfig) -> pd.DataFrame:
    """Every measured step of the arms: `family, text, source, arm, vector, onset, offset, row, plain` (row of the same
    step of the plain model). The zero dose is measured at every onset."""
    requests = run.requests()
    requests["rid"] = requests["rid"].map(asked_rid)
    tokens = run.tokens()
    tokens = tokens[(tokens["phase"] != schema.OVERSHOOT) & (tokens["position"] >= config.prompt_tokens)]
    tokens = tokens.assign(rid=tokens["rid"].map(asked_rid), step=tokens["position"] - config.prompt_tokens + 1)
    parts = pd.DataFrame(
        [(rid, *named(rid)) for rid in requests["rid"]], columns=["rid", "text", "source", "arm", "on"]
    )
    parts = parts.merge(requests[["rid", "family"]], on="rid")
    told = tokens[["rid", "step", "row"]].merge(parts, on="rid")
    plain = told[told["arm"] == PLAIN].rename(columns={"row": "plain"})[["text", "source", "step", "plain"]]
    arms = told[told["arm"] != PLAIN].merge(plain, on=["text", "source", "step"])
    zero = arms["arm"] == NOTHING
    frames = [arms[~zero].assign(onset=arms.loc[~zero, "on"])]
    frames += [arms[zero].assign(onset=onset) for onset in config.onsets]
    found = pd.concat(frames, ignore_index=True)
    found["offset"] = found["step"] - found["onset"]
    # Two steps before the onset show that nothing was steered there.
    found = found[found["offset"].between(-2, config.window + config.after - 1)]
    if (found[["row", "plain"]] < 0).any(axis=None) or not len(found):
        raise ProbeError(f"{run.path} has a step without a row", fix="record it again with --overwrite")
    kinds = {config.vector: VECTOR, NOTHING: ZERO}
    return found.assign(
        source=found["source"].map(SOURCES), vector=found["arm"], arm=[kinds.get(a, RANDOM) for a in found["arm"]]
    )[["family", "text", "source", "arm", "vector", "onset", "offset", "row", "plain"]].reset_index(drop=True)


def _measure(
    run: Run,
    at: pd.DataFrame,
    unembedding: Any,
    vector_M: torch.Tensor,
    positive: list[int],
    negative: list[int],
    tell: Callable[[str], None],
) -> pd.DataFrame:
    """With `kl` (of the plain prediction to the steered one, nats), `shift` (of the target's log-odds) and `projection`
    (of the difference of the last layer's rows on the vector, in its own direction, absolute)."""
    point = run.hook_points[-1]
    unit = vector_M.float() / vector_M.float().norm()
    parts: list[Array] = []
    for start in range(0, len(at), _BLOCK):
        tell(f"comparing predictions: {start:,} of {len(at):,}")
        some = at.iloc[start : start + _BLOCK]
        x, x0 = (run.rows(point, some[k].to_numpy()).float() for k in ("row", "plain"))
        p, q = (torch.log_softmax(unembedding.logits(r), -1) for r in (x0, x))
        kl = (p.exp() * (p - q)).sum(-1)
        shift = log_odds(q, positive, negative) - log_odds(p, positive, negative)
        parts.append(torch.stack([kl, shift, (x - x0) @ unit], dim=1).double().numpy())
    found = np.concatenate(parts)
    return at.assign(**{name: found[:, j] for j, name in enumerate(("kl", "shift", "projection"))})


def _free(run: Run, config: SteerDecayConfig, positive: list[int]) -> pd.DataFrame:
    """Share of the target's tokens among those that steered steps predict, over the plain model's at the same steps."""
    requests = run.requests()
    outputs = {named(asked_rid(r.rid)): (r.family, r.output_ids) for r in requests.itertuples()}
    rows = []
    for (text, source, arm, onset), (family, output) in outputs.items():
        if arm == PLAIN:
            continue
        plain = outputs[(text, source, PLAIN, 0)][1]
        # Step s predicts token s + 1, which is output[s].
        cut = slice(onset, onset + config.window)
        share, base = (float(np.isin(tokens[cut], positive).mean()) for tokens in (output, plain))
        kind = VECTOR if arm == config.vector else RANDOM
        rows.append((family, kind, onset, share - base, base))
    frame = pd.DataFrame(rows, columns=["family", "arm", "onset", "excess", "plain"])
    found = []
    by = frame.groupby(["arm", "onset", "family"])[["excess", "plain"]].mean().reset_index()
    for (arm, onset), mine in by.groupby(["arm", "onset"], sort=False):
        interval = mean_intervals(mine[["excess"]].to_numpy(np.float64))
        ends = {"excess": interval.estimate[0], "excess_low": interval.low[0], "excess_high": interval.high[0]}
        found.append({"arm": arm, "onset": onset, **ends, "plain": mine["plain"].mean()})
    return pd.DataFrame(found)
