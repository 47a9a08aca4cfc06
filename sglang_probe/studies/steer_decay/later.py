"""What arrives of the dose elsewhere: features of a later layer, and a probe on what the model wrote by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.eviction.likelihood import Unembedding
from sglang_probe.run.run import Run
from sglang_probe.sae.folder import read_sae
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.steering.library import THRESHOLD, Library
from sglang_probe.studies.steer_decay.config import SteerDecayConfig
from sglang_probe.studies.steer_decay.names import PLAIN, named, rid_of
from sglang_probe.studies.steer_decay.runs import downstream_point
from sglang_probe.studies.steer_decay.statistics import HUMAN, OWN, RANDOM, VECTOR, ZERO
from sglang_probe.studies.steer_decay.target import log_odds
from sglang_probe.workload.request import asked_rid

_BLOCK = 1024
DOWNSTREAM = ["source", "arm", "onset", "activation", "low", "high", "after", "plain"]


def downstream(run: Run, at: pd.DataFrame, config: SteerDecayConfig) -> pd.DataFrame:
    """Rise of the summed activation of the features at the later layer, by source, arm and onset (`DOWNSTREAM`).

    Args:
        at: every measured step with `row` and `plain`, as `study` has them. Steps before the onset take no part.
    """
    point = downstream_point(config)
    if point is None:
        return pd.DataFrame(columns=DOWNSTREAM)
    assert config.downstream is not None
    sae = read_sae(config.downstream.sae)
    at = at[at["offset"] >= 0].reset_index(drop=True)
    z = {}
    for name in ("row", "plain"):
        rows, place = np.unique(at[name].to_numpy(np.int64), return_inverse=True)
        parts = [
            sae.encode(run.rows(point, rows[i : i + _BLOCK]).float())[:, config.downstream.features].sum(1)
            for i in range(0, len(rows), _BLOCK)
        ]
        z[name] = torch.cat(parts).double().numpy()[place]
    told = at.assign(rise=z["row"] - z["plain"], base=z["plain"], within=at["offset"] < config.window)
    found = []
    for (source, arm, onset), mine in told.groupby(["source", "arm", "onset"], sort=False):
        by = mine.groupby(["family", "within"])[["rise", "base"]].mean().unstack()
        ends = mean_intervals(by[[("rise", True)]].to_numpy(np.float64))
        numbers = (ends.estimate[0], ends.low[0], ends.high[0], by[("rise", False)].mean(), by[("base", True)].mean())
        found.append((source, arm, onset, *numbers))
    frame = pd.DataFrame(found, columns=DOWNSTREAM)
    order = {name: i for i, name in enumerate((OWN, HUMAN, VECTOR, RANDOM, ZERO))}
    return frame.sort_values(
        ["source", "arm", "onset"], key=lambda c: c.map(order) if c.name != "onset" else c, ignore_index=True
    )


TEXT_PATH = ["arm", "onset", "shift", "low", "high", "plain"]


def text_path(
    run: Run, unembedding: Unembedding, config: SteerDecayConfig, positive: list[int], negative: list[int]
) -> pd.DataFrame:
    """What the steered text does by itself: the target's log-odds in the steps after the window, where the text that an
    arm wrote is read without steering, over those after the plain model's text (`TEXT_PATH`, nats).

    The texts differ, so that nothing is paired but the prompt; much noisier than the teacher-forced shift.

    Args:
        run: `names.REREAD`, with rows of the last layer.
    """
    point = run.hook_points[-1]
    requests = run.requests()
    prompts = {asked_rid(r.rid): (r.rid, r.family) for r in requests.itertuples()}
    rows = []
    for rid, (stored, family) in prompts.items():
        text, source, arm, onset = named(rid)
        if arm == PLAIN:
            continue
        # Step s is the row of position `prompt_tokens + s - 1`.
        first = config.prompt_tokens + onset + config.window - 1
        levels = []
        for name in (stored, prompts[rid_of(text, source, PLAIN, 0)][0]):
            x = run.activations(name, point)[first : first + config.after]
            levels.append(float(log_odds(torch.log_softmax(unembedding.logits(x), -1), positive, negative).mean()))
        kind = VECTOR if arm == config.vector else RANDOM
        rows.append((family, kind, onset, levels[0] - levels[1], levels[1]))
    frame = pd.DataFrame(rows, columns=["family", "arm", "onset", "shift", "plain"])
    found = []
    for (arm, onset), some in frame.groupby(["arm", "onset"], sort=False):
        by = some.groupby("family")[["shift", "plain"]].mean()
        ends = mean_intervals(by[["shift"]].to_numpy(np.float64))
        found.append((arm, onset, ends.estimate[0], ends.low[0], ends.high[0], by["plain"].mean()))
    return pd.DataFrame(found, columns=TEXT_PATH)


def probed(run: Run, library: Library, config: SteerDecayConfig) -> pd.DataFrame:
    """What the probe says of the texts that the arms wrote by themselves, over what it says of the plain model's.

    The rows are those of the tokens that steered steps predicted, read again without steering: a probe after the
    vector's layer would see the vector itself in the rows of the steered run.

    Args:
        run: `names.REREAD`: each text as a prompt.
    """
    assert config.probe is not None
    probe = library[config.probe]
    weights, threshold = probe.vector.double(), probe.scalar(THRESHOLD)
    scores: dict[str, Any] = {}
    requests = run.requests()
    family = {asked_rid(r.rid): r.family for r in requests.itertuples()}
    for rid in requests["rid"]:
        scores[asked_rid(rid)] = (run.activations(rid, probe.card.hook_point).double() @ weights).numpy()
    rows = []
    for rid, mine in scores.items():
        text, source, arm, onset = named(rid)
        if arm == PLAIN:
            continue
        first = config.prompt_tokens + onset  # position of the token that step `onset` predicts
        cut = slice(first, first + config.window)
        plain = scores[rid_of(text, source, PLAIN, 0)][cut]
        fires, base = ((x > threshold).mean() for x in (mine[cut], plain))
        kind = VECTOR if arm == config.vector else RANDOM
        rows.append((family[rid], kind, onset, fires - base, mine[cut].mean() - plain.mean(), base))
    frame = pd.DataFrame(rows, columns=["family", "arm", "onset", "fires", "score", "plain"])
    found = []
    for (arm, onset), some in frame.groupby(["arm", "onset"], sort=False):
        by = some.groupby("family")[["fires", "score", "plain"]].mean()
        ends = mean_intervals(by[["fires", "score"]].to_numpy(np.float64))
        row: dict[str, Any] = {"arm": arm, "onset": onset, "plain": by["plain"].mean()}
        for j, name in enumerate(("fires", "score")):
            row |= {name: ends.estimate[j], f"{name}_low": ends.low[j], f"{name}_high": ends.high[j]}
        found.append(row)
    return pd.DataFrame(found)
