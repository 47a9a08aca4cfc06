"""The trainings side by side, on the same rows: `python experiments/sae-curve-smollm2/compare.py FOLDER...`.

Each folder is the output of one `sglang-probe sae train`, the first that of `models/sae-smollm2`, with which the others
are compared. Writes `summary.json` and `curve.svg` beside this file, and prints the table.
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.config import load_config
from sglang_probe.report.figures import lines
from sglang_probe.sae.evaluation import evaluate
from sglang_probe.sae.folder import read_sae
from sglang_probe.stats.intervals import ratio_intervals
from sglang_probe.studies.sae_train.config import SaeTrainConfig
from sglang_probe.studies.sae_train.study import prepare

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "models/sae-smollm2/train.yaml"
WHOLE, SHARE = "whole trainings (decay included)", "{:,} samples from {:,} rows"


def trainings(folders: list[Path]) -> pd.DataFrame:
    """Every dictionary: how it was trained, how good it is on the rows held out, and how much worse than the first."""
    held_out = prepare(load_config(RECIPE, SaeTrainConfig), "recipe").held_out
    families = held_out.tokens["family"].to_numpy()
    sizes = pd.Series(families).groupby(families).size().to_numpy()
    found, errors = [], []
    for folder in folders:
        of = json.loads((folder / "training.json").read_text())
        for place in sorted(p.parent for p in folder.glob("*/result.json")):
            told = json.loads((place / "result.json").read_text())["dictionary"]
            judged = evaluate(read_sae(place), held_out.batches())
            errors.append(pd.Series(judged.rows["error"] / judged.variance).groupby(families).sum().to_numpy())
            more = ratio_intervals((errors[-1] - errors[0])[:, None], sizes[:, None])
            samples = of["config"]["samples"] // of["config"]["batch_size"] * of["config"]["batch_size"]
            row = {"rows": of["rows"]["train"], "samples": samples, "passes": samples / of["rows"]["train"]}
            row |= {"seed": told["seed"], "explained_variance": judged.explained_variance, "l0": judged.l0}
            row |= {"dead_share": judged.dead_share, "l0_as_trained": told["l0_as_trained"]}
            row |= {"explained_as_trained": told["explained_variance_as_trained"], "more": float(more.estimate[0])}
            row |= {"more_low": float(more.low[0]), "more_high": float(more.high[0]), "seconds": told["seconds"]}
            found.append(row)
    return pd.DataFrame(found)


def curves(folders: list[Path]) -> pd.DataFrame:
    """The learning curve of every training, on 2,048 of the rows held out."""
    parts = []
    for folder in folders:
        of, curve = json.loads((folder / "training.json").read_text()), pd.read_csv(folder / "tables/curve.csv")
        decays = (1 - of["config"]["lr_decay"]) * curve["samples"].max()
        told = {"rows": of["rows"]["train"], "of": curve["samples"].max(), "decaying": curve["samples"] > decays}
        seed = curve["dictionary"].str.extract(r"seed(\d+)")[0].astype(int)
        parts.append(curve.assign(**told, seed=seed).drop(columns=["dictionary", "step", "loss", "l0"]))
    return pd.concat(parts, ignore_index=True)


def figure(found: pd.DataFrame, curve: pd.DataFrame) -> str:
    """Explained variance of held-out rows by samples of training."""
    shown = curve[(curve["seed"] == 0) & (curve["recalibrated"] > 0)]
    names = [SHARE.format(o, r) for o, r in zip(shown["of"], shown["rows"], strict=True)]
    parts = [pd.DataFrame({"samples": shown["samples"], "value": shown["recalibrated"], "curve": names})]
    whole = found[(found["seed"] == 0) & (found["rows"] == found["rows"].max())].sort_values("samples")
    parts.append(pd.DataFrame({"samples": whole["samples"], "value": whole["explained_variance"], "curve": WHOLE}))
    return lines(
        pd.concat(parts, ignore_index=True),
        "samples",
        "value",
        "curve",
        kind="percent",
        title="Explained variance of held-out rows by samples of training",
        x_label="samples (rows, repeats included)",
        y_label="explained variance",
    ).standalone()


def main() -> None:
    """Write both files, and print the table."""
    folders = [Path(p) for p in sys.argv[1:]]
    found, curve = trainings(folders), curves(folders)
    parts: dict[str, Any] = {"trainings": found, "curve": curve}
    rounded = {
        n: [{k: round(v, 6) if isinstance(v, float) and np.isfinite(v) else v for k, v in r.items()} for r in rows]
        for n, rows in (
            (n, frame.astype(object).where(frame.notna(), None).to_dict("records")) for n, frame in parts.items()
        )
    }
    (HERE / "summary.json").write_text(json.dumps(rounded, indent=1) + "\n")
    (HERE / "curve.svg").write_text(figure(found, curve))
    print(found.round(4).to_string())


if __name__ == "__main__":
    main()
