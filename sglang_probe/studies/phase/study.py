"""Human text, the model's own text prefilled, and the same text decoded: three kinds of rows at the same positions.

Decoded against reforward is *numerics*: same tokens, same positions, another path through the engine. Reforward against
human is *content*: same path, other text. Decoded against human, which is what calibration on prompts and use on
answers compares, is both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.run.run import Run
from sglang_probe.stats.distance import row_distance
from sglang_probe.studies.base import records
from sglang_probe.studies.floor import MARGIN, cell_sums, comparisons, floor_table
from sglang_probe.studies.phase.moments import describe, reference_band
from sglang_probe.studies.phase.probe import probe
from sglang_probe.studies.phase.rows import read_rows, row_indices
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

Array = np.ndarray[Any, Any]

HUMAN, DECODED, REFORWARD = "human", "decoded", "reforward"
BIN = 32
CONTRASTS = {
    "numerics and content": (DECODED, HUMAN),
    "content": (REFORWARD, HUMAN),
    "numerics": (DECODED, REFORWARD),
}


@dataclass(frozen=True)
class PhaseResult:
    """Everything the report and the terminal show; frames are tidy."""

    name: str
    moments: pd.DataFrame
    """kind, hook_point and the columns of `moments.describe`."""
    by_position: pd.DataFrame
    """kind, hook_point, start (bin of positions after the prompt), norm, variance, outliers."""
    probes: pd.DataFrame
    """contrast, hook_point, auc, low, high, null_low, null_high, p."""
    numerics: pd.DataFrame
    """Decoded against reforward beside the floor (`sglang_probe.studies.floor.floor_table`), per hook point."""
    texts: int
    positions: int
    checks: dict[str, list[Check]]
    manifest: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "texts": self.texts,
            "positions": self.positions,
            **{k: records(frame) for k, frame in self.tables().items()},
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table."""
        return {k: getattr(self, k) for k in ("moments", "by_position", "probes", "numerics")}


def study_phase(
    runs: Mapping[str, Sequence[Run]], start: int, end: int, name: str, *, tell: Callable[[str], None] = lambda _: None
) -> PhaseResult:
    """Compare the rows of positions `[start, end)`.

    Args:
        runs: `human`, `decoded` and `reforward`, each with its replicates.
        start, end: the positions of the continuation.
        tell: called with what is being done.

    Raises:
        ProbeError: a run has not computed all these positions itself.
    """
    checks = {}
    where: dict[str, list[Array]] = {}
    for kind, replicates in runs.items():
        where[kind] = []
        for run in replicates:
            tell(f"reading and verifying {run.path.name}")
            checks[run.path.name] = verify(run)
            index, rows = row_indices(run, start, end)
            where[kind].append(rows)
    texts, family = len(index), _families(run, index)
    moments, by_position, probes, sums = [], [], [], []
    for hook_point in runs[HUMAN][0].hook_points:
        tell(f"comparing {hook_point}")
        by_kind = {
            kind: [read_rows(run, hook_point, w) for run, w in zip(runs[kind], where[kind], strict=True)]
            for kind in runs
        }
        firsts = {kind: r[0] for kind, r in by_kind.items()}
        moments += _moments(firsts, hook_point, family)
        by_position += _by_position(firsts, hook_point, family)
        for contrast, (a, b) in CONTRASTS.items():
            found = asdict(probe(firsts[a], firsts[b], family))
            probes.append({"contrast": contrast, "hook_point": hook_point, **found})
        sums.append(_numerics(by_kind, hook_point, family))
    return PhaseResult(
        name=name,
        moments=pd.DataFrame(moments),
        by_position=pd.DataFrame(by_position),
        probes=pd.DataFrame(probes),
        numerics=floor_table(pd.concat(sums, ignore_index=True), REFORWARD, margin=MARGIN),
        texts=texts,
        positions=texts * (end - start),
        checks=checks,
        manifest=runs[HUMAN][0].manifest,
    )


def _families(run: Run, index: Array) -> Array:
    """Number of the family of each text; a text without one is a family of its own."""
    requests = run.requests().set_index("index").loc[index]
    return np.asarray(pd.factorize(requests["family"].fillna(requests["rid"]))[0], dtype=np.int64)


def _moments(rows: Mapping[str, Array], hook_point: str, family: Array) -> list[dict[str, Any]]:
    """Moments on the texts with odd numbers; the human rows of the even ones are the reference for outliers."""
    band = reference_band(rows[HUMAN][::2])
    return [{"kind": k, "hook_point": hook_point, **describe(x[1::2], band, family[1::2])} for k, x in rows.items()]


def _by_position(rows: Mapping[str, Array], hook_point: str, family: Array) -> list[dict[str, Any]]:
    out = []
    for at in range(0, rows[HUMAN].shape[1], BIN):
        band = reference_band(rows[HUMAN][::2, at : at + BIN])
        for kind, x in rows.items():
            found = describe(x[1::2, at : at + BIN], band, family[1::2])
            out.append({"kind": kind, "hook_point": hook_point, "start": at, **found})
    return out


def _numerics(rows: Mapping[str, Sequence[Array]], hook_point: str, family: Array) -> pd.DataFrame:
    """Sums of the relative L2 of decoded against reforward rows, and of replicates, per text."""
    _, positions, width = rows[DECODED][0].shape
    at = pd.DataFrame({"cluster": np.repeat(family, positions), "phase": "both"})
    runs = {f"{kind} {i}": x.reshape(-1, width) for kind in (DECODED, REFORWARD) for i, x in enumerate(rows[kind])}
    frames = []
    for c in comparisons({run: run.split()[0] for run in runs}, REFORWARD):
        l2 = row_distance(torch.from_numpy(runs[c.a]), torch.from_numpy(runs[c.b]))[0]
        frames.append(cell_sums(at, {hook_point: l2}, ()).assign(**c.columns))
    return pd.concat(frames, ignore_index=True)
