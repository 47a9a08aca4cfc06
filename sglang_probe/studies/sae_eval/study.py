"""How well an SAE reconstructs the rows of runs, in all, by segment, phase and position, and run by run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import load_run
from sglang_probe.sae.evaluation import Evaluation, Sinks, evaluate
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.harvested import harvested
from sglang_probe.sae.manifest import facts_of_run, of, refuse_other_model
from sglang_probe.studies.base import Measured, Tell
from sglang_probe.studies.sae_eval.against import compared
from sglang_probe.studies.sae_train.study import labels


@dataclass(frozen=True)
class EvalResult(Measured):
    """An SAE on the rows of runs."""

    sae: str
    hook_point: str
    weights: str
    """SHA-256 of its weights."""
    found: Evaluation
    left_out: pd.DataFrame
    notes: Sequence[str]
    training_variance: float | None
    """Of the rows that it was trained on; None where its folder does not say."""
    against: pd.DataFrame | None = None
    """Ours beside SAELens' own evaluation (`against.COLUMNS`); None: not asked for."""

    @property
    def groups(self) -> pd.DataFrame:
        """By axis and group."""
        return self.found.groups

    @property
    def latents(self) -> pd.DataFrame:
        """By `latent`: `rate` (share of rows in which it fires) and `mean` (activation where it does)."""
        fired = self.found.fired
        mean = np.where(fired > 0, self.found.activation_sum / np.maximum(fired, 1), np.nan)
        return pd.DataFrame({"latent": np.arange(len(fired)), "rate": self.found.rate, "mean": mean})

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "sae": self.sae,
            "hook_point": self.hook_point,
            "weights_sha256": self.weights,
            "training_variance": self.training_variance,
            **self.found.to_json(),
            "groups": self.groups.to_dict("records"),
            "left_out": self.left_out.to_dict("records"),
            "notes": list(self.notes),
            **({} if self.against is None else {"against": self.against.to_dict("records")}),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Groups, latents, rows that were left out, and what SAELens says."""
        tables = {"groups": self.groups, "latents": self.latents, "left_out": self.left_out}
        return tables if self.against is None else {**tables, "against": self.against}


def judge(
    folder: Path,
    paths: Sequence[Path],
    *,
    hook_point: str | None = None,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 40_000,
    against_saelens: bool = False,
    gap: Path | None = None,
    model: Path | None = None,
    texts: int = 16,
    tell: Tell = lambda _: None,
) -> EvalResult:
    """Judge an SAE.

    Args:
        hook_point: for folders that do not say.
        most: rows, drawn at random from those of the runs.
        against_saelens: have SAELens judge it too.
        gap: results of `sglang-probe sae gap`, for the cross-entropy in that comparison.
        model: folder of the run's model, where it is not at the path that the run names.
        texts: how many of them run through SAELens' model.

    Raises:
        ConfigError: the SAE cannot be read, or is of another model than the runs; or SAELens is not installed, or `gap`
            is of another SAE.
        RunDirectoryError: a run cannot be read, or lacks the hook point.
    """
    sae = read_sae(folder, hook_point=hook_point)
    if sae.hook_point is None:
        raise ConfigError(f"{folder} does not say where its rows come from", fix="give --hook-point")
    runs = [load_run(p) for p in paths]
    told = of(sae) or {}
    known = refuse_other_model(sae, runs, str(folder))
    rows = harvested(runs, sae.hook_point, where=where, sinks=sinks)
    notes = []
    trained = {r["manifest_sha256"] for r in told.get("runs", [])}
    if same := [r.path.name for r in runs if facts_of_run(r)["manifest_sha256"] in trained]:
        notes.append(f"it was trained on rows of {', '.join(same)}: what is printed of these is not of rows held out")
    if not known:
        notes.append("whether the SAE and the rows are of the same weights is not known")
    if len(rows) > most:
        rows = rows.only(np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False)))
    by = labels(rows)
    if len(runs) > 1:
        by["run"] = [runs[i].path.name for i in rows.tokens["run"]]
    found = evaluate(sae, rows.batches(), groups=by)
    against = None
    if against_saelens:
        how = {"sinks": sinks or Sinks(), "gap": gap, "model": model, "texts": texts, "tell": tell}
        against, unknown = compared(folder, runs, rows, found, **how)  # type: ignore[arg-type]
        notes += unknown
    variance = (told.get("training") or {}).get("training_variance")
    weights = weights_sha256(folder)
    return EvalResult(folder.name, sae.hook_point, weights, found, rows.left_out, notes, variance, against)
