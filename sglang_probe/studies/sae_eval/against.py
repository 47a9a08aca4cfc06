"""Our numbers beside SAELens' own evaluation of the same weights, and why they differ where they do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError, UnsupportedError
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae import saelens
from sglang_probe.sae.evaluation import Evaluation, Sinks, evaluate
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.harvested import Harvested
from sglang_probe.studies.base import SUMMARY, Tell
from sglang_probe.studies.lens.study import checkpoint_of
from sglang_probe.studies.phase.study import HUMAN
from sglang_probe.studies.sae_gap.measures import where_of

COLUMNS = ["quantity", "measured_on", "ours", "theirs", "difference", "why"]
MOST_TOKENS = 256
"""Of a text, where the texts of a run have different lengths."""
SAME = "one definition and the same rows: theirs sums squares in float32"
_LEGACY = (
    "theirs, kept for old results: the mean over rows of 1 - error / squared distance from the mean of the batch, so "
    "that rows near the mean weigh most; ours and their other one divide the mean error by the variance of all rows"
)
_SINKS = "ours leaves out attention sinks (first positions, large norms), theirs nothing but special tokens"
_PASS = "the same positions: rows of the engine ({}) against SAELens' own forward pass in float32"
_SPLICED = "one definition, the same positions: replaced in the engine against in SAELens' own forward pass"
_EVERYWHERE = (
    "theirs replaces rows at every position, the first and the prompt too, and takes losses there; its other end "
    "is a text of nothing but zeros"
)


def same_rows(folder: Path, rows: Harvested, found: Evaluation) -> pd.DataFrame:
    """On the rows that ours was judged by.

    Raises:
        ConfigError: SAELens is not installed.
    """
    theirs = saelens.of_rows(folder, rows.x_ND)
    on = f"{len(rows):,} rows, sinks left out"
    return _frame(
        [
            ("explained variance", on, found.explained_variance, theirs["explained_variance"], SAME),
            ("mean squared error", on, float(found.rows["error"].mean()), theirs["mse"], SAME),
            ("active latents (L0)", on, found.l0, theirs["l0"], SAME),
            ("dead latents", on, found.dead_share, theirs["dead_share"], SAME),
            ("explained variance, legacy", on, found.explained_variance, theirs["explained_variance_legacy"], _LEGACY),
        ]
    )


def by_default(folder: Path, run: Run, checkpoint: Path, sinks: Sinks, texts: int) -> pd.DataFrame:
    """Texts of a run as SAELens evaluates by itself: every position, through a model of its own.

    Raises:
        RunDirectoryError: no text has a row at each position, or no token ids are known.
        UnsupportedError: as `saelens.of_texts`.
    """
    sae = read_sae(folder)
    assert sae.hook_point is not None
    chosen, x_TCD = _whole(run, sae.hook_point, texts)
    theirs = saelens.of_texts(folder, checkpoint, sae.hook_point, chosen)
    n, length, width = x_TCD.shape
    plain = ~np.isin(chosen.numpy(), saelens.special_ids(checkpoint)).ravel()
    flat = x_TCD.reshape(-1, width)
    sink, _ = sinks.of(np.tile(np.arange(length), n), flat.norm(dim=1).numpy())
    on = f"{n} texts of {length} tokens"
    rows = []
    dtype = str(run.row_layout(sae.hook_point)[1]).removeprefix("torch.")
    for mask, why in ((~sink, _SINKS), (plain, _PASS.format(dtype))):
        ours = evaluate(sae, flat[torch.from_numpy(mask)])
        where = f"{on}; ours {int(mask.sum()):,} rows, theirs {int(plain.sum()):,}"
        rows += [
            ("explained variance", where, ours.explained_variance, theirs["explained_variance"], why),
            ("active latents (L0)", where, ours.l0, theirs["l0"], why),
            ("dead latents", where, ours.dead_share, theirs["dead_share"], why),
        ]
    return _frame(rows)


def recovered(folder: Path, run: Run, points: pd.DataFrame, checkpoint: Path, texts: int) -> pd.DataFrame:
    """Cross-entropy and divergence: as `sglang-probe sae gap` measured them in the engine on human text.

    Args:
        run: its human text. points: its positions.

    Raises:
        RunDirectoryError: token ids of it are not known.
        UnsupportedError: as `saelens.of_texts`.
    """
    hook_point = read_sae(folder).hook_point
    assert hook_point is not None
    start, end = int(points["position"].min()), int(points["position"].max()) + 1
    index, _ = where_of(run, start, end, intervened=False)
    requests = run.requests().set_index("index").loc[index[:texts]]
    if any(p is None or min(p[:end]) < 0 for p in requests["prompt_ids"]):
        raise RunDirectoryError(f"{run.path} lacks token ids of its texts", fix="make the results of `sae gap` again")
    ids = torch.from_numpy(np.array([list(p)[:end] for p in requests["prompt_ids"]], dtype=np.int64))
    some = points.iloc[: len(ids) * (end - start)].dropna(subset=["nll"])
    ours = some[["nll", "nll_sae", "nll_zero", "kl_sae", "kl_zero"]].mean()
    theirs = saelens.of_texts(folder, checkpoint, hook_point, ids, start=start)
    everywhere = saelens.of_texts(folder, checkpoint, hook_point, ids)
    on = f"{len(ids)} texts, positions {start} to {end - 2}"
    kept = float((ours["nll_zero"] - ours["nll_sae"]) / (ours["nll_zero"] - ours["nll"]))
    score = float(1 - ours["kl_sae"] / ours["kl_zero"])
    whole = f"{len(ids)} texts; ours positions {start} to {end - 2}, theirs 0 to {end - 2}"
    return _frame(
        [
            ("cross-entropy", on, ours["nll"], theirs["ce_loss_without_sae"], _SPLICED),
            ("cross-entropy, reconstructions", on, ours["nll_sae"], theirs["ce_loss_with_sae"], _SPLICED),
            ("cross-entropy, zeros", on, ours["nll_zero"], theirs["ce_loss_with_ablation"], _SPLICED),
            ("cross-entropy recovered", on, kept, theirs["ce_loss_score"], _SPLICED),
            ("KL, reconstructions", on, ours["kl_sae"], theirs["kl_div_with_sae"], _SPLICED),
            ("KL recovered", on, score, theirs["kl_div_score"], _SPLICED),
            ("cross-entropy recovered", whole, kept, everywhere["ce_loss_score"], _EVERYWHERE),
            ("KL recovered", whole, score, everywhere["kl_div_score"], _EVERYWHERE),
        ]
    )


def compared(
    folder: Path,
    runs: Sequence[Run],
    rows: Harvested,
    found: Evaluation,
    *,
    sinks: Sinks,
    gap: Path | None,
    model: Path | None,
    texts: int,
    tell: Tell = lambda _: None,
) -> tuple[pd.DataFrame, list[str]]:
    """All of it, and what could not be compared.

    Raises:
        ConfigError: SAELens is not installed, or `gap` is of another SAE.
    """
    points = None if gap is None else _points(folder, gap)
    tell("SAELens judges the rows")
    tables, notes = [same_rows(folder, rows, found)], []
    try:
        tell("SAELens judges texts of the run")
        tables.append(by_default(folder, runs[0], checkpoint_of(runs[0], model), sinks, texts))
        if gap is None or points is None:
            notes.append("cross-entropy recovered was not compared: give the results of `sglang-probe sae gap` (--gap)")
        else:
            tell("SAELens replaces rows")
            human = load_run(gap / HUMAN)
            tables.append(recovered(folder, human, points, checkpoint_of(human, model), texts))
    except (ConfigError, RunDirectoryError, UnsupportedError) as e:
        notes.append(f"not all was compared: {e}")
    return pd.concat(tables, ignore_index=True), notes


def _frame(rows: Sequence[tuple[str, str, Any, Any, str]]) -> pd.DataFrame:
    found = [[q, on, float(a), float(b), float(b) - float(a), why] for q, on, a, b, why in rows]
    return pd.DataFrame(found, columns=COLUMNS)


def _whole(run: Run, hook_point: str, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[texts, positions]` of the first texts that are long enough, and their rows, float32."""
    requests = run.requests()
    requests = requests[requests["prompt_ids"].notna()]
    if requests.empty:
        raise RunDirectoryError(f"{run.path} has no token ids of prompts", fix="record with privacy level `ids`")
    lengths = requests["prompt_ids"].map(len)
    length = min(int(lengths.median()), MOST_TOKENS) if lengths.nunique() > 1 else int(lengths.iloc[0])
    ids, rows = [], []
    for rid, prompt in requests.loc[lengths >= length, ["rid", "prompt_ids"]].itertuples(index=False):
        x = run.activations(rid, hook_point, missing="nan")[:length].float()
        if len(x) == length and not bool(x.isnan().any()):
            ids.append(list(prompt)[:length])
            rows.append(x)
        if len(ids) == most:
            break
    if not ids:
        raise RunDirectoryError(f"{run.path} has no text with a row of `{hook_point}` at each of {length} positions")
    return torch.tensor(ids, dtype=torch.int64), torch.stack(rows)


def _points(folder: Path, gap: Path) -> pd.DataFrame:
    """Positions of human text in the results of a gap study, text by text."""
    try:
        told = json.loads((gap / SUMMARY).read_text(encoding="utf-8"))
        points = pd.read_parquet(gap / "tables" / "points.parquet")
        weights = told["sae"]["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{gap} holds no results of `sglang-probe sae gap`: {e}") from e
    if weights != weights_sha256(folder):
        raise ConfigError(f"{gap} is of another SAE than {folder}")
    human = points[points["kind"] == HUMAN]
    if "nll_sae" not in human or not human["nll_sae"].notna().any():
        raise ConfigError(f"{gap} has no human text whose rows were replaced", fix="name `human` in `spliced`")
    return human
