"""`sglang-probe sae hybrid` on runs that are there: `python experiments/sae-hybrid-smollm2/train.py RUNS OUTPUT`.

RUNS is the folder of `sglang-probe sae gap experiments/sae-gap-smollm2/experiment.yaml`: its human, decoded and
prefilled runs are what the study would record. Goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sglang_probe.config import load_config
from sglang_probe.harvest.progress import Quiet
from sglang_probe.run.run import load_run
from sglang_probe.sae.manifest import model_of
from sglang_probe.studies.lessons import train_missing
from sglang_probe.studies.phase.study import HUMAN
from sglang_probe.studies.sae_hybrid.command import SaeHybrid
from sglang_probe.studies.sae_hybrid.config import SaeHybridConfig
from sglang_probe.studies.sae_hybrid.runs import ARMS, identity, lessons, read_rows
from sglang_probe.studies.sae_hybrid.study import study_hybrid
from sglang_probe.studies.sae_stability.runs import scale_of


def main() -> None:
    """Train what is missing, and write the report."""
    runs, folder = (Path(p) for p in sys.argv[1:])
    config = load_config(Path(__file__).with_name("experiment.yaml"), SaeHybridConfig)
    found = {arm: load_run(runs / arm) for arm in ARMS}
    rows = read_rows(config, found)
    human = rows.held_out[HUMAN]
    folder.mkdir(parents=True, exist_ok=True)
    train_missing(
        lessons(config, rows),
        folder,
        recipe=config.recipe,
        latents=config.latents,
        scale=scale_of(rows.train[HUMAN], len(rows.keys)),
        held_out=human.rows(np.arange(len(human.at_K))),
        metadata={"model_name": model_of([found[HUMAN]]).get("name"), "hook_name": config.hook_point},
        identity=identity(config, found),
        overwrite=False,
        resume=True,
        reporter=Quiet(),
    )
    assert config.name is not None
    SaeHybrid().write(study_hybrid(found, config, folder, config.name, print), folder)


if __name__ == "__main__":
    main()
