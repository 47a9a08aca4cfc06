"""Results of the studies of dictionaries, made up from random numbers: as large or as small as is asked."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_hybrid.runs import ARMS
from sglang_probe.studies.sae_hybrid.study import HybridResult
from sglang_probe.studies.sae_overlap.study import OverlapResult
from sglang_probe.studies.sae_stability.config import ORDER, REPEAT
from sglang_probe.studies.sae_stability.study import SEED, StabilityResult, distances
from tests.studies.made_results import CHECKS, every, random

CONFIG = {"hook_point": "blocks.2.hook_resid_post", "architecture": "batchtopk", "latents": 64, "k": 4, "samples": 9000}
CONFIG |= {"batch_size": 64, "seeds": [0, 1], "sampling": {"temperature": 1.0}}
OF = {"model": {"name": "m"}, "config": CONFIG, "keys": 90, "rows_held_out": 40, "families_held_out": 8}
NULLS = ("value", "swapped", "swapped_low", "p", "halves", "across")
MATCHED = ("mcc", "mcc_chance", "mcc_encoder", "shared", "above_0.7", "same_index")


def overlap(latents: int = 40, dictionaries: int = 2) -> OverlapResult:
    """Every statistic, and so many other dictionaries."""
    by_latent = pd.DataFrame({"latent": range(latents)})
    splits = pd.DataFrame({"dictionary": [f"d{i}" for i in range(dictionaries)]})
    splits = splits.assign(latents=latents, splits=1, other_latents=latents, merges=2)
    rotated = random(pd.DataFrame({"statistic": ["median", "low"]}), "value", "exchanged", "exchanged_low", "p")
    active = random(pd.DataFrame({"regime": ["a", "b", "second minus first"]}), "mean", "low", "median", "high")
    return OverlapResult(
        sae="d",
        hook_point=CONFIG["hook_point"],
        weights="0" * 64,
        names=("a", "b"),
        runs=[],
        rows=900,
        texts=8,
        same_tokens=5,
        numerics=random(pd.DataFrame({"rows": [5]}), "jaccard", "jaccard_low", "jaccard_high", "identical"),
        active=active.assign(mean_low=[np.nan, np.nan, 0.1], mean_high=[np.nan, np.nan, 0.9]),
        sets=random(pd.DataFrame({"statistic": ["100 commonest shared", "rank correlation"]}), *NULLS),
        drift=random(by_latent, "rate_first", "rate_second", "log2", "p", "q"),
        rotated=random(rotated, "halves", "across", seed=1),
        turned=random(by_latent.assign(firings=30), "cosine", "exchanged", "exchanged_low", "p", "q"),
        splits=splits,
        notes=["a note"],
    )


def stability(dictionaries: int = 2, segments: int = 3, seeds: int = 2) -> StabilityResult:
    """The dictionary of the reference, so many others, and the floors."""
    others = [f"d{i}" for i in range(dictionaries)]
    pairs = every(dictionary=[*others, REPEAT, ORDER, SEED], seed=range(seeds))
    pairs = random(pairs, "distance", *MATCHED).assign(alive_first=9, alive_second=9)
    kinds = ["reference", *others, REPEAT, ORDER]
    fvu = every(dictionary=kinds, axis=["segment"], group=[f"s{i}" for i in range(segments)])
    harvests = every(harvest=kinds, segment=[f"s{i}" for i in range(segments)]).assign(keys=40, rows=30)
    own = random(pd.DataFrame({"dictionary": others}), "fvu", "fvu_of_the_reference").assign(rows=9)
    return StabilityResult(
        name="made",
        of={**OF, "reference": "reference"},
        checks=CHECKS,
        pairs=pairs,
        distances=distances(pairs, "reference"),
        coverage=random(harvests, "share", "identical"),
        fvu=random(fvu.assign(rows=10), "fvu", "l0", "more", "more_low", "more_high"),
        own=own,
        curve=random(pd.DataFrame({"dictionary": kinds, "step": 1}), "held_out"),
    )


def hybrid(shares: int = 3) -> HybridResult:
    """Human text alone, and so many shares of either source."""
    mixtures = every(source=[DECODED, REFORWARD], share=np.linspace(0, 1, shares + 1)[1:])
    mixtures = pd.concat([pd.DataFrame({"source": [HUMAN], "share": [0.0]}), mixtures], ignore_index=True)
    fvu = mixtures.merge(pd.DataFrame({"arm": ARMS}), how="cross")
    distance = ("moved", "moved_chance", "seeds", "seeds_chance")
    return HybridResult(
        name="made",
        of={**OF, "repeated_8_grams": dict.fromkeys(ARMS, 0.1)},
        checks=CHECKS,
        fvu=random(fvu, "fvu", "more", "more_low", "more_high"),
        gaps=random(mixtures, "gap", "gap_low", "gap_high"),
        matches=random(mixtures, *distance),
        curve=random(mixtures, "held_out"),
    )
