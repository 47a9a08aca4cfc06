"""Numbers by row as `measures` gives them, with planted effects."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_gap.runs import MEAN, RANDOM, SPLICED, ZERO

VARIANCE = 10.0


def points(
    texts: int = 30,
    steps: int = 224,
    *,
    start: int = 64,
    drift: float = 0.0,
    by_depth: float = 0.0,
    hotter: float = 0.0,
    worse: float = 1.5,
    seed: int = 0,
) -> pd.DataFrame:
    """Three kinds of rows. Errors fall with entropy and have an effect of the text.

    Args:
        drift: of the model's own text, a share of the variance. by_depth: the same at the last step, growing from 0.
        hotter: share of its rows that are moved into the highest band of entropy.
        worse: KL of the SAE's errors over that of random ones.
    """
    rng = np.random.default_rng(seed)
    frames = []
    effect = rng.normal(size=texts)
    own = _rows(rng, texts, steps, effect, hotter)
    own["error"] += VARIANCE * (drift + by_depth * own["step"] / steps)
    for kind, frame in ((HUMAN, _rows(rng, texts, steps, effect, 0.0)), (REFORWARD, own), (DECODED, own.copy())):
        frame = frame.assign(kind=kind, position=frame["step"] + start - 1, squared_norm=VARIANCE, active=16)
        level = 0.1 * np.exp(0.2 * rng.normal(size=texts))[frame["text"].to_numpy()]
        for name, kl in ((SPLICED, worse), (RANDOM, 1.0), (MEAN, 30.0), (ZERO, 50.0)):
            frame[f"kl_{name}"] = level * kl * rng.lognormal(0, 0.2, len(frame))
            frame[f"nll_{name}"] = frame["nll"] + frame[f"kl_{name}"]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _rows(rng: np.random.Generator, texts: int, steps: int, effect: np.ndarray, hotter: float) -> pd.DataFrame:
    text, step = np.repeat(np.arange(texts), steps), np.tile(np.arange(1, steps + 1), texts)
    entropy = rng.uniform(0, 4, len(text))
    entropy = np.where(rng.random(len(text)) < hotter, rng.uniform(3, 4, len(text)), entropy)
    error = VARIANCE * (0.3 - 0.04 * np.floor(entropy)) + 0.1 * effect[text] + rng.normal(0, 0.3, len(text))
    nll = np.where(step == steps, np.nan, rng.exponential(3, len(text)))
    return pd.DataFrame({"text": text, "step": step, "entropy": entropy, "error": error, "nll": nll})
