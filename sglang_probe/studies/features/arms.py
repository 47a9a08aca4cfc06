"""What labels are found for and judged on: the latents of a dictionary, and of its nulls.

A label is worth what it scores beyond three nulls: labels of *other* latents, *random directions* that fire as often,
and the latents of a *randomly initialised model*, on the same texts, of a dictionary of its own (Heap et al.
2501.17727 find that the scores of these are much alike).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import labels
from sglang_probe.sae.coded_run import Coded, code_runs, run_names
from sglang_probe.sae.folder import read_sae
from sglang_probe.sae.manifest import model_of, refuse_other_model
from sglang_probe.sae.sae import SAE

Array = np.ndarray[Any, Any]
OWN, DIRECTIONS, RANDOM_MODEL = "labels", "random_directions", "random_model"
NULL_LATENTS, NULL_ROWS = 200, 20_000


@dataclass(frozen=True)
class Arm:
    """Latents, their token-set labels, and what these score."""

    name: str
    coded: Coded
    codes: Any
    """Activations, scipy CSR `[N, M]`; those of `coded`, or of random directions on its rows."""
    first: Array
    """Texts that labels are found on, bool `[texts]`; the others judge them."""
    rules: labels.Rules
    scores: labels.Scores

    @property
    def table(self) -> pd.DataFrame:
        """`latent`, `f1`, `detection`, `fuzzing`."""
        columns = {"f1": self.rules.f1, "detection": self.scores.detection, "fuzzing": self.scores.fuzzing}
        return pd.DataFrame({"latent": np.arange(len(self.rules.f1)), **columns})


def judged(name: str, coded: Coded, codes: Any, seed: int) -> Arm:
    """Find token-set labels on half of the texts, and judge them on the other half."""
    fires = labels.fired(codes)
    first = labels.halves(coded.texts["family"].tolist(), seed)
    finds = first[coded.text_of_row]
    rules = labels.token_rules(fires[np.flatnonzero(finds)], coded.rows["token_id"].to_numpy()[finds])
    return Arm(name, coded, codes, first, rules, labels.score(coded, fires, rules, ~first, seed=seed))


def random_directions(runs: Sequence[Run], sae: SAE, own: Arm, seed: int) -> tuple[Arm, Array] | None:
    """Random directions on some of the texts, each firing as often as one of the latents; whose rates these are. None
    where no latent could be judged."""
    coded = own.coded
    rng = np.random.default_rng([seed, 4])
    chosen = np.sort(rng.permutation(np.flatnonzero(~np.isnan(own.scores.detection)))[:NULL_LATENTS])
    if not len(chosen):
        return None
    # Whole texts: in a window of which some rows were not read, nobody knows whether a direction is silent.
    text = coded.text_of_row
    order = rng.permutation(len(coded.texts))
    rows = np.bincount(text, minlength=len(order))[order]
    taken = np.zeros(len(order), dtype=bool)
    taken[order[: int((rows.cumsum() < NULL_ROWS).sum()) + 1]] = True
    at = np.flatnonzero(taken[text])
    part = replace(coded, rows=coded.rows.iloc[at].reset_index(drop=True), norms=coded.norms[at])
    rates = labels.fired(coded.codes).sum(0) / len(coded)
    x = _rows(runs, str(sae.hook_point), part.rows)
    codes = labels.random_directions(x, np.asarray(rates).ravel()[chosen], seed=seed)
    return judged(DIRECTIONS, replace(part, codes=codes), codes, seed), chosen


def _rows(runs: Sequence[Run], point: str, rows: pd.DataFrame) -> Array:
    """The captured rows, `[N, D]`, of some that were coded."""
    by_name = dict(zip(run_names([r.path for r in runs]), runs, strict=True))
    out: Array | None = None
    for name, at in rows.groupby("run", sort=False).indices.items():
        x = by_name[str(name)].rows(point, rows["row"].to_numpy()[at]).float().numpy()
        out = np.empty((len(rows), x.shape[1]), np.float32) if out is None else out
        out[at] = x
    assert out is not None
    return out


def random_model(
    paths: Sequence[Path],
    folder: Path,
    of: Sequence[Run],
    sae: SAE,
    *,
    seed: int,
    tell: Callable[[int, int], None],
    **how: Any,
) -> tuple[Arm, list[str]]:
    """The latents of a dictionary of a model that was not trained; and what differs beside the model, in words.

    Args:
        paths: runs of that model.
        folder: of its SAE.
        of: runs of the trained model.
        how: as `code_runs`.

    Raises:
        ConfigError: the weights are those of the trained model, or the hook points differ.
    """
    runs, null = [load_run(p) for p in paths], read_sae(folder, hook_point=str(sae.hook_point))
    refuse_other_model(null, runs, str(folder))
    if null.hook_point != sae.hook_point:
        raise ConfigError(f"{folder} is of `{null.hook_point}` and the other SAE of `{sae.hook_point}`")
    trained, random = (model_of(r).get("weights_sha256") for r in (of, runs))
    if trained and trained == random:
        raise ConfigError(
            f"the rows of {paths[0]} are of the same weights as those that labels are wanted of",
            fix="`sglang-probe model randomise MODEL --output DIR` makes a model that was not trained",
        )
    notes = []
    if null.W_dec.shape[0] != sae.W_dec.shape[0]:
        notes.append(
            f"the SAE of the random model has {null.W_dec.shape[0]:,} latents, and this one {sae.W_dec.shape[0]:,}"
        )
    digests = [{r.manifest.get("workload_digest") for r in part} for part in (of, runs)]
    if digests[0] != digests[1]:
        notes.append("the random model read other texts than this one")
    coded = code_runs(runs, null, seed=seed, tell=tell, **how)
    return judged(RANDOM_MODEL, coded, coded.codes, seed), notes
