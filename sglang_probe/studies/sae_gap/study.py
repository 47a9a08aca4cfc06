"""How well one SAE reconstructs human text, the model's own text prefilled, and that text as it was decoded.

Decoded against human is what calibrating on prompts and using on answers compares. It is split into content (another
text, both prefilled) and numerics (the same text, decoded); into what happens within bands of entropy and what is
another mixture of bands (`sglang_probe.sae.gap`); and by depth, position and band. All errors are shares of one
variance, that of human rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.folder import weights_sha256
from sglang_probe.sae.sae import SAE
from sglang_probe.studies.ab.plan import REPEAT
from sglang_probe.studies.base import Tell, records
from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_gap import measures, tables
from sglang_probe.studies.sae_gap.config import SaeGapConfig
from sglang_probe.studies.sae_gap.runs import VARIANTS, sae_of
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

Array = np.ndarray[Any, Any]
KINDS = (HUMAN, REFORWARD, DECODED)


@dataclass(frozen=True)
class GapResult:
    """Everything the report and the terminal show; frames are those of `tables`."""

    name: str
    sae: Mapping[str, Any]
    """`folder`, `hook_point`, `latents`, `weights_sha256`."""
    variance: float
    """Of human rows, sinks left out: what all errors are a share of."""
    sinks: int
    """Rows that were left out as attention sinks."""
    temperature: Any
    arms: pd.DataFrame
    gaps: pd.DataFrame
    by_depth: pd.DataFrame
    by_position: pd.DataFrame
    by_band: pd.DataFrame
    effects: pd.DataFrame
    effects_by: pd.DataFrame
    points: pd.DataFrame
    checks: dict[str, list[Check]]
    manifest: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data; without the numbers of single positions."""
        return {
            "name": self.name,
            "sae": dict(self.sae),
            "variance": self.variance,
            "sinks": self.sinks,
            "temperature": self.temperature,
            **{k: records(frame) for k, frame in self.tables().items() if k != "points"},
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table."""
        names = ("arms", "gaps", "by_depth", "by_position", "by_band", "effects", "effects_by", "points")
        return {n: getattr(self, n) for n in names}


def study_gap(runs: Mapping[str, Run], config: SaeGapConfig, name: str, *, tell: Tell = lambda _: None) -> GapResult:
    """Compare the rows of the continuation.

    Args:
        runs: by name, as `runs.run` gives them.

    Raises:
        ProbeError: a run has not computed all these positions itself, or there are interventions where none belong.
    """
    sae = sae_of(config)
    assert sae.hook_point is not None
    start, end = config.prompt_tokens, config.prompt_tokens + config.continuation_tokens
    checks = {}
    where: dict[str, Array] = {}
    for n, run in runs.items():
        tell(f"reading and verifying {n}")
        checks[n] = verify(run)
        index, where[n] = measures.where_of(run, start, end, intervened=n.rpartition(".")[2] in VARIANTS)
    texts = _texts(runs[HUMAN], index)
    unembedding = load_unembedding(Path(runs[HUMAN].manifest["model_path"]))
    frames, of_texts, floors, totals = [], [], {}, {}
    for kind in KINDS:
        tell(f"reconstructing and predicting: {kind}")
        ids = measures.token_ids(runs[kind], kind, start, end)
        found = measures.reconstruction(sae, runs[kind], where[kind])
        named = {v: f"{kind}.{v}" for v in VARIANTS if f"{kind}.{v}" in runs}
        variants = {v: (runs[n], where[n]) for v, n in named.items()}
        predicted = measures.predictions(runs[kind], where[kind], ids, variants, unembedding)
        at = pd.DataFrame({"kind": kind, "text": np.repeat(texts, end - start)})
        at["position"] = np.tile(np.arange(start, end), len(texts))
        frames.append(pd.concat([at.assign(step=at["position"] - start + 1), found, predicted], axis=1))
        floors[kind] = _floor(sae, runs, where, kind, found)
        of_texts += [
            {"kind": kind, "text": t, "repeated": measures.repetition(x, 8), "distinct": 1 - measures.repetition(x, 2)}
            for t, x in zip(texts, ids, strict=True)
        ]
    points = pd.concat(frames, ignore_index=True)
    norm = np.sqrt(points["squared_norm"].to_numpy())
    limit = Sinks(0, config.norm_multiple).limit(norm[points["kind"] == HUMAN])
    points["sink"] = norm > limit
    for kind in KINDS:
        kept = ~points.loc[points["kind"] == kind, "sink"].to_numpy()
        totals[kind] = _variance(runs[kind], sae.hook_point, where[kind].ravel()[kept])
    used = points[~points["sink"]]
    variance = totals[HUMAN]
    of = pd.DataFrame(of_texts)
    loops = set(of.loc[of["repeated"] > tables.LOOPS, "text"])
    return GapResult(
        name=name,
        sae={
            "folder": Path(config.sae).name,
            "hook_point": sae.hook_point,
            "latents": sae.latents,
            "weights_sha256": weights_sha256(Path(config.sae)),
        },
        variance=variance,
        sinks=int(points["sink"].sum()),
        temperature=config.sampling.get("temperature"),
        arms=tables.arms(used, variance, totals, of),
        gaps=tables.gaps(used, variance, loops, {k: f / variance for k, f in floors.items()}),
        by_depth=tables.by_depth(used, variance),
        by_position=tables.by_position(used, variance),
        by_band=tables.by_band(used, variance),
        effects=tables.effects(used, config.spliced),
        effects_by=tables.effects_by(used, config.spliced),
        points=points,
        checks=checks,
        manifest=runs[HUMAN].manifest,
    )


def _texts(run: Run, index: Array) -> Array:
    """Name of each text's family; a text without one is a family of its own."""
    requests = run.requests().set_index("index").loc[index]
    return requests["family"].fillna(requests["rid"]).to_numpy()


def _floor(sae: SAE, runs: Mapping[str, Run], where: Mapping[str, Array], kind: str, found: pd.DataFrame) -> float:
    """What a second recording of the same run, in another order, changes of the mean error; NaN: there was none."""
    if (name := kind + REPEAT) not in runs:
        return float("nan")
    again = measures.reconstruction(sae, runs[name], where[name])
    return abs(float(again["error"].mean() - found["error"].mean()))


def _variance(run: Run, hook_point: str, rows: Array) -> float:
    x = run.rows(hook_point, rows).double()
    return float(x.square().sum(1).mean() - x.mean(0).square().sum())
