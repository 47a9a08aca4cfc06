"""The dashboard: one file with a card for every latent that fires, searched and sorted by a script of its own.

The file loads nothing, and runs the one script whose hash its content security policy names. All text of the run is
put in as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.report.figures import visible
from sglang_probe.run import journal
from sglang_probe.sae.labels import AFTER, BEFORE
from sglang_probe.studies.features.arms import OWN
from sglang_probe.studies.features.study import FeaturesResult

DASHBOARD = "dashboard.html"
MOST_BYTES = 20_000_000
_MORE_BEFORE = 8
_HERE = Path(__file__).parent
_STEPS = ((5, 10), (2, 10), (1, 5), (0, 3))
"""Examples of each quarter and of the top, from the most on until the file is small enough."""

Array = np.ndarray[Any, Any]


def write_dashboard(result: FeaturesResult, folder: Path, *, most_bytes: int = MOST_BYTES) -> list[str]:
    """Write it; returns what was left out to keep it small enough, in words."""
    pages = (render(result, per_bin, tops) for per_bin, tops in _STEPS)
    page, left_out = next(pages), []
    for fewer in pages:
        if len(page.encode()) <= most_bytes:
            break
        page, left_out = fewer, ["the dashboard has fewer examples than `tables/`: it would be too large"]
    if len(page.encode()) > most_bytes:
        kept = int(0.9 * most_bytes / len(page.encode()) * int((result.latents["rate"] > 0).sum()))
        page = render(result, *_STEPS[-1], most=kept)
        left_out.append(f"the dashboard has only the {kept:,} latents that fire most: it would be too large")
    journal.write_text_durably(folder / DASHBOARD, page)
    return left_out


def render(result: FeaturesResult, per_bin: int = 5, tops: int = 10, most: int | None = None) -> str:
    """The page."""
    data = json.dumps(collect(result, per_bin, tops, most), separators=(",", ":"), allow_nan=False)
    # No `<` can end the element that holds the data.
    data = data.replace("<", "\\u003c")
    script = (_HERE / "dashboard.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (_HERE / "dashboard.html").read_text(encoding="utf-8")
    return page.replace("{{digest}}", digest).replace("{{script}}", script).replace("{{data}}", data)


def collect(result: FeaturesResult, per_bin: int, tops: int, most: int | None = None) -> dict[str, Any]:
    """What the script shows, as plain data."""
    coded, latents = result.coded, result.latents
    alive = latents[latents["rate"] > 0]
    shown = alive.sort_values("rate", ascending=False).head(most) if most is not None else alive
    examples = _fewer(result.examples[result.examples["latent"].isin(shown["latent"])], per_bin, tops)
    words = _Words(result)
    used = np.zeros(len(coded.ids), dtype=bool)
    windows = [coded.window(int(f), BEFORE + _MORE_BEFORE, AFTER) for f in examples["flat"]]
    for a, b in windows:
        used[a:b] = True
    place = np.cumsum(used) - 1
    flat = [words.number(int(t)) for t in coded.ids[used]]
    held: dict[int, list[Any]] = {}
    columns = coded.codes.tocsc()
    dense = np.zeros(len(coded) + 1, dtype=np.float32)
    names = {place: i for i, place in enumerate(zip(coded.texts["run"], coded.texts["rid"], strict=True))}
    at = examples["latent"].to_numpy()
    groups = zip(examples.itertuples(index=False), windows, strict=True)
    current = -1
    for (e, (a, b)), m in zip(groups, at, strict=True):
        if m != current:
            dense[:] = 0
            part = slice(columns.indptr[m], columns.indptr[m + 1])
            dense[columns.indices[part]] = columns.data[part]
            current = m
        values = dense[coded.row_of[a:b]]  # -1 reads the last entry, which is no row's
        fired = np.flatnonzero(values)
        pairs = [x for i in fired.tolist() for x in (i, round(float(values[i]), 3))]
        line = [
            e.bin,
            names[e.run, e.rid],
            int(e.position),
            int(place[a]),
            b - a,
            int(e.flat) - a,
            int(e.reused),
            pairs,
        ]
        held.setdefault(int(m), []).append(line)
    gathered = np.flatnonzero(coded.gathered[used]).tolist()
    rates = dict(iter(result.rates.groupby("latent")))
    near = dict(iter(result.near.groupby("latent")))
    cards = [_card(result, r, words, held, rates, near) for r in shown.to_dict("records")]
    for card in cards:
        card |= _asked(result, card["i"])
    return {
        "sae": result.sae,
        "point": result.hook_point,
        "runs": result.runs,
        "model": result.model,
        "judge": result.judge,
        "rows": len(coded),
        "dead": len(latents) - len(alive),
        "hidden": len(alive) - len(shown),
        "scores": json.loads(result.scores.to_json(orient="records", double_precision=4)),
        "words": words.texts,
        "flat": flat,
        "gathered": gathered,
        "texts": [[result.runs.index(run), rid] for run, rid in names],
        "cards": cards,
    }


def _asked(result: FeaturesResult, latent: int) -> dict[str, Any]:
    """The label by a model that was asked, and its scores; nothing where there is none."""
    if result.asked is None:
        return {}
    own = result.asked[(result.asked["arm"] == OWN) & (result.asked["latent"] == latent)]
    if own.empty or own["label"].isna().all():
        return {}
    names = {"ad": "detection", "ads": "detection_shuffled", "az": "fuzzing", "azs": "fuzzing_shuffled"}
    r = own.iloc[0]
    return {"a": str(r["label"]), **{k: None if pd.isna(r[n]) else round(float(r[n]), 5) for k, n in names.items()}}


def _fewer(examples: pd.DataFrame, per_bin: int, tops: int) -> pd.DataFrame:
    number = examples.groupby(["latent", "bin"]).cumcount()
    return examples[number < np.where(examples["bin"] == "top", tops, per_bin)]


class _Words:
    """Texts of the tokens that are shown, each once."""

    def __init__(self, result: FeaturesResult) -> None:
        self._vocabulary = result.vocabulary
        self._numbers: dict[int, int] = {}
        self.texts: list[str] = []

    def number(self, token: int) -> int:
        if token not in self._numbers:
            self._numbers[token] = len(self.texts)
            self.texts.append(visible(self._vocabulary.text(token)))
        return self._numbers[token]


def _card(
    result: FeaturesResult,
    r: dict[str, Any],
    words: _Words,
    held: dict[int, list[Any]],
    rates: dict[Any, pd.DataFrame],
    near: dict[Any, pd.DataFrame],
) -> dict[str, Any]:
    m = int(r["latent"])
    card: dict[str, Any] = {"i": m, "l": r["label"], "c": int(r["cluster"]), "t": int(r["texts"])}
    names = {"r": "rate", "m": "most", "f": "f1", "d": "detection", "ds": "detection_shuffled"}
    names |= {"z": "fuzzing", "zs": "fuzzing_shuffled"}
    for short, name in names.items():
        card[short] = None if pd.isna(r[name]) else round(float(r[name]), 5)
    card["s"] = [words.number(int(t)) for t in result.rules.tokens[m]]
    if result.promoted is not None:
        p = result.promoted
        for key, ids, values in (("p", p.top, p.top_value), ("n", p.bottom, p.bottom_value)):
            card[key] = [[words.number(int(t)), round(float(v), 2)] for t, v in zip(ids[m], values[m], strict=True)]
    card["rt"] = {}
    for axis, part in rates[m].groupby("axis", sort=False):
        best = part.sort_values("rate", ascending=False).head(8) if axis != "position" else part
        card["rt"][str(axis)] = [[str(c), round(float(v), 5)] for c, v in zip(best["class"], best["rate"], strict=True)]
    for key, by in (("nd", "decoder"), ("nf", "firing")):
        part = near[m] if m in near else result.near.head(0)
        part = part[part["by"] == by]
        card[key] = [[int(j), round(float(v), 3)] for j, v in zip(part["neighbour"], part["value"], strict=True)]
    card["e"] = held.get(m, [])
    return card
