"""All measures of one layer of one request, as rows of the study's tables."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from sglang_probe.studies.query_drift.captured import Captured, WindowCoverage
from sglang_probe.studies.query_drift.change_point import change_point
from sglang_probe.studies.query_drift.cosine import window_cosine
from sglang_probe.studies.query_drift.excess import excess_drift
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.placebo import Border, at_border, placebo_borders, placebo_excess
from sglang_probe.studies.query_drift.steps import importance_cosines, step_drift
from sglang_probe.studies.query_drift.subspace import split_half_energy, subspace_drift
from sglang_probe.studies.query_drift.window_choice import control_rows, recall_by_step

WINDOWS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Window lengths of DapQ's Table 8."""

NAMES = (
    *("steps", "excess", "placebo", "subspace", "recall", "placebo_recall", "changes"),
    *("controls", "windows", "coverage"),
)


@dataclass
class Tables:
    """Rows of every table, each with `rid` and `layer` in front."""

    parts: dict[str, list[pd.DataFrame]] = field(default_factory=lambda: {name: [] for name in NAMES})

    def add(self, name: str, rid: str, layer: int, frame: pd.DataFrame) -> None:
        """Add rows of one request's layer."""
        frame.insert(0, "rid", rid)
        frame.insert(1, "layer", np.int16(layer))
        self.parts[name].append(frame)

    def frames(self) -> dict[str, pd.DataFrame]:
        """Tables that have rows."""
        return {name: pd.concat(p, ignore_index=True) for name, p in self.parts.items() if p}


def measure(
    tables: Tables, rid: str, layer: int, c: Captured, other: Captured, cover: WindowCoverage, o: DriftOptions
) -> None:
    """Add everything that one layer of one request says.

    Args:
        other: the same layer of another request, for the controls.
    """
    # Of the layer and the document alone: whatever else is measured, they have the same draws.
    seed = layer + 1000 * len(tables.parts["coverage"])
    tables.add("steps", rid, layer, step_drift(c, sinks=o.sinks))
    tables.add("excess", rid, layer, _excess(c, o))
    borders = placebo_borders(c, o, seed=zlib.crc32(rid.encode()))
    tables.add("placebo", rid, layer, placebo_excess(c, borders, o))
    tables.add("subspace", rid, layer, _subspace(c, o))
    tables.add("recall", rid, layer, _recall(c, o))
    elsewhere = [_recall(at_border(c, b), o).assign(border=i) for i, b in enumerate(borders)]
    tables.add("placebo_recall", rid, layer, pd.concat(elsewhere) if elsewhere else _recall(c, o).assign(border=0)[:0])
    tables.add("changes", rid, layer, _changes(c, borders, o, seed))
    tables.add("controls", rid, layer, control_rows(c, other, o, seed=seed))
    fitting = tuple(w for w in WINDOWS if w + o.sinks < c.length)
    tables.add("windows", rid, layer, importance_cosines(c, fitting, o.sinks))
    tables.add("coverage", rid, layer, pd.DataFrame([_coverage(c, cover)]))


def _excess(c: Captured, o: DriftOptions) -> pd.DataFrame:
    frames = []
    edges = torch.tensor(o.edges)
    for kind, centred in (("raw", False), ("centred", True)):
        prompt, decode = (c.centred(x) if centred else x for x in (c.prompt_pre_LHD, c.decode_pre_THD))
        found = excess_drift(prompt, torch.arange(c.length), decode, c.decode_at, window=c.window, edges=edges)
        heads, bins = found.prompt_HX.shape
        frames.append(
            pd.DataFrame(
                {
                    "kind": kind,
                    "head": np.repeat(np.arange(heads), bins),
                    "distance": np.tile(o.edges[:-1], heads),
                    "prompt": found.prompt_HX.flatten().numpy(),
                    "decode": found.decode_HX.flatten().numpy(),
                    "pairs": np.tile(found.decode_pairs_X.numpy(), heads),
                }
            )
        )
    frame = pd.concat(frames, ignore_index=True)
    return frame[frame["pairs"] > 0].reset_index(drop=True)


def _subspace(c: Captured, o: DriftOptions) -> pd.DataFrame:
    window, decode = c.centred(c.window_pre_NHD), c.centred(c.decode_pre_THD)
    earlier = c.centred(c.prompt_pre_LHD[-2 * c.window : -c.window])
    whole = subspace_drift(window, decode, energy=o.energy)
    columns = {
        "head": np.arange(window.shape[1]),
        "rank": whole.rank.numpy(),
        "captured": whole.captured.numpy(),
        "earlier": subspace_drift(window, earlier, energy=o.energy).captured.numpy(),
        "split_half": split_half_energy(window, energy=o.energy).numpy(),
        "random": whole.captured_null.numpy(),
    }
    for name, part in (("first", decode[: c.window]), ("last", decode[-c.window :])):
        columns[name] = subspace_drift(window, part, energy=o.energy).captured.numpy()
    return pd.DataFrame(columns)


def _recall(c: Captured, o: DriftOptions) -> pd.DataFrame:
    found = recall_by_step(c, o)
    by_step = {name: getattr(found, name).numpy() for name in ("window", "recency", "random")}
    return pd.DataFrame({"step": np.arange(1, c.steps + 1), **by_step})


def _changes(c: Captured, borders: list[Border], o: DriftOptions, seed: int) -> pd.DataFrame:
    """Change points of every head, and of as many steps after a border inside the prompt."""
    found = change_point(c.attention_HTJ(), c.length, permutations=o.permutations, seed=seed)
    frame = pd.DataFrame(
        {
            "head": np.arange(len(found.step)),
            "steps": c.steps,
            "step": found.step.numpy() + 1,
            "block": found.block.numpy(),
            "p": found.p_value.numpy(),
            "p_text": np.nan,
        }
    )
    whole = [b for b in borders if b.steps == c.steps]  # a shorter response has fewer changes to find
    if whole:
        text = at_border(c, whole[0])
        null = change_point(text.attention_HTJ(), text.length, permutations=o.permutations, seed=seed + 1)
        frame["p_text"] = null.p_value.numpy()
    return frame


def _coverage(c: Captured, cover: WindowCoverage) -> dict[str, float]:
    """Window coverage, and what the cosine would be if only the request's own queries were known."""
    decode, window = c.centred(c.decode_pre_THD), c.centred(c.window_pre_NHD)
    own = window[torch.tensor(cover.own)]
    return {
        "window": c.window,
        "computed": cover.computed,
        "gathered": cover.gathered,
        "pre_centred": float(window_cosine(decode, window).mean()),
        "pre_centred_own": float(window_cosine(decode, own).mean()) if len(own) else np.nan,
    }
