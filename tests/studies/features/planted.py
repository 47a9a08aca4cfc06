"""A run whose features are known: an SAE of orthogonal latents, some of which fire on tokens of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sglang_probe.paths import shipped
from sglang_probe.run.run import Run
from sglang_probe.sae.folder import write_sae
from sglang_probe.sae.sae import SAE
from tests.rows_run import Text, write_run

FOLDER = shipped("models/probe-text/checkpoint")
POINT = "blocks.2.hook_resid_post"
WIDTH, LATENTS, LENGTH = 256, 12, 40
MEAN = 0.3
"""Of every number of a row. Without one, rows in which nothing fires have no length, and the others look like sinks."""
SETS = [[300, 301], [302, 303, 304], [305], [306, 307], [308], [309, 310]]
"""Tokens of latents 0 to 5. Latents 6 to 8 fire at random, 9 with 6, 10 never; 11 fires after the token of latent 2."""
VOCABULARY = np.arange(300, 360)


def codes_of(ids: list[int], rng: np.random.Generator) -> np.ndarray:
    """Activations of a text, `[T, M]`."""
    z = np.zeros((len(ids), LATENTS))
    for k, tokens in enumerate(SETS):
        z[:, k] = np.isin(ids, tokens)
    z[:, 6:9] = rng.random((len(ids), 3)) < 0.08
    z[:, 9] = z[:, 6]
    z[1:, 11] = z[:-1, 2]
    return z * rng.uniform(2, 6, z.shape)


def directions(seed: int = 0) -> np.ndarray:
    """Orthogonal unit rows `[M, D]`."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(WIDTH, LATENTS)))[0].T.astype(np.float32)


def planted_sae(place: Path) -> Path:
    """The dictionary of these directions."""
    d = torch.from_numpy(directions())
    bias = torch.full((LATENTS,), -1.0)
    sae = SAE("standard", d.T.contiguous(), d, bias, torch.full((WIDTH,), MEAN), metadata={"hook_name": POINT})
    write_sae(sae, place)
    return place


def planted_run(place: Path, texts: int = 40, seed: int = 0, model: Path | None = FOLDER) -> Run:
    """Texts of random tokens; the second text reuses ten positions of the first."""
    rng = np.random.default_rng(seed)
    held, rows = {}, {}
    for i in range(texts):
        ids = rng.choice(VOCABULARY, LENGTH).tolist()
        ids[0], reuses = 350, None  # a first position is a sink, and would be a token of a latent that does not fire
        if i == 1:
            ids[:10] = held["r0"].prompt[:10]
            reuses = ("r0", 10)
        output = (350,) if i else (350, 351)  # what is still being served can be reused
        held[f"r{i}"] = Text(ids, output, family=f"f{i}", reuses=reuses)
        x = codes_of([*ids, *output[:-1]], rng) @ directions() + MEAN
        if reuses:
            x[:10] = rows["r0"][:10]
        rows[f"r{i}"] = torch.from_numpy(x.astype(np.float32))
    return write_run(place, held, {POINT: rows}, model=model)
