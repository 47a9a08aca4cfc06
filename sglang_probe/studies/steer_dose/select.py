"""Which features of an SAE are steered by: those whose decoder row, added, raises its own logit-lens tokens most.

Candidates are found by the unembedding alone. The *output score* of a candidate is measured: the rise of the
log-probability of its own logit-lens tokens together, in nats, mean over steps and texts (after Arad et al. 2025,
arXiv:2505.20063, who rank and weigh these tokens; what activates a feature says little about what it does).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.eviction.likelihood import Unembedding, load_unembedding
from sglang_probe.run.run import Run, load_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.steering import library, make
from sglang_probe.steering.contrast import sample_rows
from sglang_probe.steering.library import Library
from sglang_probe.studies.steer_decay.target import lens_tokens, log_odds, token_ids
from sglang_probe.studies.steer_dose.config import Select, SteerDoseConfig
from sglang_probe.studies.steer_dose.names import PLAIN
from sglang_probe.studies.steer_dose.steps import places, predictions

LIBRARY = "library"
_MARK = "steer-dose.txt"


def feature_name(index: int) -> str:
    """Of a candidate, in the library of the study."""
    return f"feature-{index}"


def candidates(config: SteerDoseConfig, model: Path) -> list[int]:
    """Features whose decoder rows favour the target most, by the unembedding alone.

    Raises:
        ConfigError: the SAE cannot be read, is of another width, or has fewer features.
    """
    select = config.select
    assert select is not None
    sae, unembedding = read_sae(select.sae), load_unembedding(model)
    if sae.width != len(unembedding.norm_M):
        raise ConfigError(f"the SAE reads rows of width {sae.width}, and the model's have {len(unembedding.norm_M)}")
    if sae.latents < select.candidates:
        raise ConfigError(f"the SAE has {sae.latents} features, and `candidates` asks for {select.candidates}")
    positive, negative = (token_ids(model, t) for t in (config.target.positive, config.target.negative))
    return most_aligned(sae.W_dec, unembedding, positive, negative, select.candidates)


def most_aligned(
    rows_FM: torch.Tensor, unembedding: Unembedding, positive: list[int], negative: list[int], k: int
) -> list[int]:
    """The k rows that favour the positive tokens over the negative ones most, at equal length of the rows."""
    weight = unembedding.weight_VM
    towards = unembedding.norm_M * (weight[positive].mean(0) - weight[negative].mean(0))
    rows = rows_FM.float()
    scores = rows @ towards / rows.norm(dim=1).clamp(min=1e-12)
    return [int(i) for i in scores.argsort(descending=True, stable=True)[:k]]


def write_library(config: SteerDoseConfig, model: Path, folder: Path) -> Path:
    """The library of the study: what its arms name of the user's, and all candidates. Made anew each time.

    Raises:
        RunDirectoryError: the folder is there and is none of ours.
        ConfigError: an entry cannot be made.
    """
    select = config.select
    assert select is not None
    assert config.steer is not None
    if folder.exists():
        if not (folder / _MARK).exists():
            raise RunDirectoryError(f"{folder} is in the way: this study did not make it", fix="give another output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MARK).write_text("Made by `sglang-probe steer dose`, and made anew whenever it runs.\n")
    theirs = Library.open(config.steer.library)
    for name in sorted({v for arm in config.arms.values() for v in arm.vectors or ()}):
        _copy(theirs, name, folder)
    run = load_run(select.run)
    sae = read_sae(select.sae)
    if sae.hook_point is None:
        raise ConfigError(f"{select.sae} does not say where its rows come from")
    sampled = sample_rows(run, sae.hook_point, rows=50_000, seed=0)
    for index in candidates(config, model):
        target = make.Target(folder, feature_name(index))
        make.sae_feature(target, select.sae, index, run, trust=select.same_model, sampled=sampled)
    return folder


def output_scores(run: Run, config: SteerDoseConfig) -> pd.DataFrame:
    """Of each candidate `feature, own, target, own_tokens, chosen`: the rise of the log-probability of its own
    logit-lens tokens, and the shift of the target's log-odds, nats, means over texts; best first.

    Raises:
        ProbeError: a step has no row.
    """
    select = config.select
    assert select is not None
    model = Path(run.manifest["model_path"])
    unembedding = load_unembedding(model)
    positive, negative = (token_ids(model, t) for t in (config.target.positive, config.target.negative))
    decoder = read_sae(select.sae).W_dec
    at = places(run, config.steps)
    found = []
    for what, mine in at[at["arm"] != PLAIN].groupby("what", sort=False):
        index = int(str(what).rpartition("-")[2])
        own, _ = lens_tokens(decoder[index], unembedding, select.lens)
        rise, shift = [], []
        for p, q, _ in predictions(run, mine, unembedding):
            rise.append((q[:, own].logsumexp(-1) - p[:, own].logsumexp(-1)).double().numpy())
            shift.append((log_odds(q, positive, negative) - log_odds(p, positive, negative)).double().numpy())
        by = mine.assign(own=np.concatenate(rise), target=np.concatenate(shift)).groupby("text")[["own", "target"]]
        own_mean, target_mean = by.mean().mean()
        found.append((index, own_mean, target_mean, own))
    frame = pd.DataFrame(found, columns=["feature", "own", "target", "own_tokens"])
    frame = frame.sort_values(["own", "feature"], ascending=[False, True], ignore_index=True)
    return frame.assign(chosen=np.arange(len(frame)) < select.take)


def chosen(scores: pd.DataFrame) -> list[str]:
    """Names of the features that are taken."""
    return [feature_name(i) for i in scores.loc[scores["chosen"], "feature"]]


def selecting(select: Select | None) -> int:
    """Texts that the choice is made on."""
    return 0 if select is None else select.texts


def _copy(theirs: Library, name: str, folder: Path) -> None:
    vector = theirs[name]
    if vector.card.kind == "sae":
        raise ConfigError(f"`{name}` is a whole SAE: name its features")
    told = vector.card.model_dump(mode="json", exclude={"width", "norm", "sha256", "sae"})
    library.write(folder, vector.tensors, **told)
