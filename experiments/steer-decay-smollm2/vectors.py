"""The library of `steer-decay-smollm2` and `steer-dose-smollm2`: directions of two axes at two layers, their random
controls, a probe at a later layer, and one feature of the SAE of `models/sae-smollm2`.

    python experiments/steer-decay-smollm2/vectors.py TEXTS RUNS LIBRARY SAE SAE_RUN

TEXTS is what `texts.py` wrote. One engine records the four sets of prompts; `vector make` does the same one at a time.
The feature is the one that is most active before words of prose and least before punctuation of code, on the rows that
the SAE was trained on: it was chosen by what activates it.
"""

# ruff: noqa: T201

from __future__ import annotations

import sys
from pathlib import Path

from sglang_probe.harvest.api import Experiment
from sglang_probe.run.run import Run, load_run
from sglang_probe.steering import make, probe
from sglang_probe.steering.make import Target

AXES = {"prose": ("prose", "code"), "errors": ("errors", "plain")}
LAYERS = (8, 10)
PROBE_LAYER = 20
RANDOM_SEEDS = (1, 2)
ACTIVATING = 2005


def point(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def recorded(texts: Path, folder: Path) -> dict[str, Run]:
    """A run of every set of prompts."""
    experiments = {
        kind: Experiment(
            model="smollm2-135m",
            dtype="float32",
            workload={"source": "jsonl", "path": str(texts / f"{kind}.jsonl")},
            hook_points=["hook_embed", *(point(i) for i in (*LAYERS, PROBE_LAYER))],
            sampling={"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
            server={"max_total_tokens": 16384},
        )
        for kinds in AXES.values()
        for kind in kinds
    }
    with next(iter(experiments.values())) as first:
        return {
            kind: first.record(folder / kind, requests=experiment.requests, resume=True)
            for kind, experiment in experiments.items()
        }


def main(texts: Path, runs: Path, library: Path, sae: Path, sae_run: Path) -> None:
    make.sae_feature(Target(library, "prose-activating", True), sae, ACTIVATING, load_run(sae_run))
    found = recorded(texts, runs)
    for axis, (positive, negative) in AXES.items():
        for layer in LAYERS:
            target = Target(library, f"{axis}-{layer}", True)
            pair = (found[positive], found[negative], point(layer))
            vector = make.mean_difference(target, *pair, phase="prefill", place="last")
            print(vector.card.name, vector.card.norm, vector.card.layer_mean_norm, vector.card.evidence)
            for seed in RANDOM_SEEDS:
                name = f"{axis}-{layer}-random-{seed}"
                make.random_control(Target(library, name, True), found["code"], point(layer), seed=seed, like=vector)
        scores = probe.write(
            Target(library, f"{axis}-probe", True), found[positive], found[negative], point(PROBE_LAYER), fpr=0.05
        )
        print(scores.card.name, scores.card.evidence)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:6]))
