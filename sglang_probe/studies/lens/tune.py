"""Train a tuned lens on the rows of a run, and say what it is worth on texts that it was not fitted to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sglang_probe.errors import ConfigError
from sglang_probe.eviction.likelihood import Unembedding, load_unembedding
from sglang_probe.run.batches import in_parts
from sglang_probe.run.run import load_run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.manifest import facts_of_run, model_of
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.positions import drawn_positions
from sglang_probe.studies.lens.study import EMBEDDING, captured_layers, checkpoint_of, last_layer
from sglang_probe.studies.lens.translators import Translator, TunedLens, fit, log_probabilities, mean_kl

Array = np.ndarray[Any, Any]
LEAST_FAMILIES = 6
FIT, CHOOSE, HELD_OUT = "fit", "choose", "held out"
MOST_JUDGED = 1000
"""Rows that candidates are chosen by, and rows that are held out: predictions over the vocabulary are kept of them."""


@dataclass(frozen=True)
class TuneResult(Measured):
    """A tuned lens beside the plain one."""

    run: str
    model: str
    lens: TunedLens
    layers: pd.DataFrame
    """A row for each layer: `layer`, `how` (`identity`: the plain lens is kept), `plain` and `tuned` (mean KL on
    held-out rows, nats), `saved` with ends (their difference, by family; negative where the map is worse there),
    `plain_agreement` and `tuned_agreement` (share of rows whose likeliest token is the model's), `rows`."""
    families: Mapping[str, int]
    rows: Mapping[str, int]
    """By use."""
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "run": self.run,
            "model": self.model,
            "families": dict(self.families),
            "rows": dict(self.rows),
            "layers": self.layers.to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """The layers."""
        return {"layers": self.layers}


def tune(
    path: Path,
    *,
    model: Path | None = None,
    where: str | None = None,
    sinks: Sinks | None = None,
    most: int = 6000,
    steps: int = 100,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> TuneResult:
    """Train a translator for every captured layer but the last.

    Args:
        model: folder of the checkpoint; default: the one that the run names.
        where: which positions, a pandas query over the columns of `run.tokens()`.
        sinks: rows left out; default: position 0, and norms of 10 times the layer's median.
        most: positions to read. steps: of the descent in each layer.

    Raises:
        ConfigError: the last layer was not captured, no other was, or there are fewer than six families of texts.
    """
    run = load_run(path)
    folder = checkpoint_of(run, model)
    head = load_unembedding(folder)
    points = captured_layers(run)
    last = last_layer(run, points)
    if last is None:
        raise ConfigError(
            f"{path} lacks rows after the model's last layer, which a tuned lens is trained to foresee",
            fix="harvest with `hook_points: [hook_embed, blocks.*.hook_resid_post]`",
        )
    if len(points) < 2:
        raise ConfigError(f"{path} has rows of the last layer alone: there is nothing to translate")
    chosen = drawn_positions(run, points, lambda: in_parts(run, where, name="--where"), most, seed)
    rows = {layer: run.rows(name, chosen["row"].to_numpy()).float() for layer, name in points.items()}
    keep, left = _without_sinks(rows, chosen, sinks or Sinks())
    chosen, rows = chosen[keep], {layer: x[torch.from_numpy(keep)] for layer, x in rows.items()}
    families = run.requests().set_index("rid")["family"]
    family = chosen["rid"].map(families).fillna(chosen["rid"]).to_numpy().astype(str)
    use, by_use = _split(family, seed)
    at = {name: np.flatnonzero(use == name) for name in (FIT, CHOOSE, HELD_OUT)}
    for name in (CHOOSE, HELD_OUT):
        at[name] = np.sort(np.random.default_rng([seed, 1]).permutation(at[name])[:MOST_JUDGED])
    found, records = _layers(rows, at, family, last, head, steps, seed, tell)
    manifest = {
        "model": model_of([run]),
        "run": facts_of_run(run),
        "families": {name: sorted(names) for name, names in by_use.items()},
        "rows": {name: len(i) for name, i in at.items()},
        "left_out": left,
        "steps": steps,
        "seed": seed,
        "layers": records,
        "torch": torch.__version__,
    }
    notes = [f"{left} rows (first positions, and attention sinks by their norm) were left out."] if left else []
    worse = [str(r["layer"]) for r in records if r["saved"] < 0]
    if worse:
        notes.append(
            f"After layer {', '.join(worse)} the map is worse than the plain lens on held-out texts, although it was "
            "better on those to choose by. It is in the folder all the same: what is held out chooses nothing."
        )
    if kept := [str(r["layer"]) for r in records if r["how"] == "identity" and r["layer"] != last]:
        notes.append(
            f"After layer {', '.join(kept)} no map did better than the plain lens on the texts to choose by: the plain "
            "one is kept."
        )
    name = str((run.manifest.get("model") or {}).get("name") or folder.name)
    return TuneResult(
        run.path.name,
        name,
        TunedLens(found, manifest),
        pd.DataFrame(records),
        {name: len(names) for name, names in by_use.items()},
        {name: len(i) for name, i in at.items()},
        notes,
    )


def _layers(
    rows: Mapping[int, Tensor],
    at: Mapping[str, Array],
    family: Array,
    last: int,
    head: Unembedding,
    steps: int,
    seed: int,
    tell: Callable[[int, int], None],
) -> tuple[dict[int, Translator], list[dict[str, Any]]]:
    fitted, judging, held = (torch.from_numpy(at[name]) for name in (FIT, CHOOSE, HELD_OUT))
    with torch.no_grad():
        judge_log, held_log = (log_probabilities(rows[last][i], head) for i in (judging, held))
    translators, records = {}, []
    of = len(rows) - 1
    for done, (layer, x) in enumerate(i for i in rows.items() if i[0] != last):
        tell(done, of)
        plain = Translator.identity(x.shape[1])
        tuned = fit(x[fitted], rows[last][fitted], x[judging], judge_log, head, steps=steps, seed=seed)
        with torch.no_grad():
            before, after = (mean_kl(x[held], held_log, t, head) for t in (plain, tuned))
            agreement = [float(_agrees(x[held], held_log, t, head)) for t in (plain, tuned)]
        translators[layer] = tuned
        by_family = pd.DataFrame({"f": family[at[HELD_OUT]], "saved": (before - after).numpy()})
        saved = mean_intervals(by_family.groupby("f")["saved"].mean().to_numpy()[:, None])
        records.append(
            {
                "layer": layer,
                "how": tuned.how,
                "plain": float(before.mean()),
                "tuned": float(after.mean()),
                "saved": float(saved.estimate[0]),
                "saved_low": _number(saved.low[0]),
                "saved_high": _number(saved.high[0]),
                "plain_agreement": agreement[0],
                "tuned_agreement": agreement[1],
                "rows": len(held),
            }
        )
    tell(of, of)
    return translators, records


def _number(x: float) -> float | None:
    """None where there is no interval, because JSON has no NaN."""
    return float(x) if np.isfinite(x) else None


def _agrees(x_ND: Tensor, log_NV: Tensor, translator: Translator, head: Unembedding) -> Tensor:
    parts = zip(torch.split(x_ND, 128), torch.split(log_NV, 128), strict=True)
    return torch.cat([head.logits(translator(x)).argmax(-1) == log.argmax(-1) for x, log in parts]).float().mean()


def _without_sinks(rows: Mapping[int, Tensor], chosen: pd.DataFrame, sinks: Sinks) -> tuple[Array, int]:
    """Which rows are a sink after no layer, and how many are."""
    position = chosen["position"].to_numpy()
    sink = np.zeros(len(chosen), dtype=bool)
    for layer, x in rows.items():
        if layer != EMBEDDING:
            sink |= sinks.of(position, x.norm(dim=1).numpy())[0]  # type: ignore[no-untyped-call]
    return ~sink, int(sink.sum())


def _split(family: Array, seed: int) -> tuple[Array, dict[str, set[str]]]:
    """Use of each row, and families by use: 70 % to fit, 15 % to choose by, 15 % held out, two of each at least."""
    names = np.random.default_rng(seed).permutation(np.unique(family))
    if len(names) < LEAST_FAMILIES:
        raise ConfigError(
            f"rows of {len(names)} families of texts are too few to fit a lens and hold texts out",
            fix=f"harvest at least {LEAST_FAMILIES} texts that share no prefix",
        )
    few = max(2, round(0.15 * len(names)))
    by_use = {CHOOSE: set(names[:few]), HELD_OUT: set(names[few : 2 * few]), FIT: set(names[2 * few :])}
    use = np.full(len(family), FIT, dtype=object)
    for name in (CHOOSE, HELD_OUT):
        use[np.isin(family, list(by_use[name]))] = name
    return use, {name: {str(f) for f in found} for name, found in by_use.items()}
