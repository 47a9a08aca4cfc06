"""What the study leaves: a summary for programs, `coverage.md` for people, and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.run import journal
from sglang_probe.studies.coverage.result import Coverage
from sglang_probe.studies.coverage.words import card_text, paragraph, worst_in_words
from sglang_probe.verify.check import Check


@dataclass(frozen=True)
class CoverageResult:
    """The studies of one run or several, and the files of correction weights of each run, by the name of the map."""

    studies: Sequence[Coverage]
    weights: Mapping[str, Mapping[str, Path]]

    @property
    def ok(self) -> bool:
        """A damaged run is refused, so that what is here can be used."""
        return True

    @property
    def checks(self) -> dict[str, list[Check]]:
        """None: `sglang-probe verify` checks a run."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return to_json(self.studies, self.weights)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Classes of every map, and how many occurrences a computed position stands for."""
        frames: dict[str, list[pd.DataFrame]] = {}
        for c in self.studies:
            for m in c.maps:
                for kind in ("classes", "multiplicity"):
                    frame = getattr(m, kind).astype(dict.fromkeys(m.axes, str))
                    frames.setdefault(f"{kind}-{'-'.join(m.axes)}", []).append(frame.assign(run=c.run))
        return {name: pd.concat(parts, ignore_index=True) for name, parts in frames.items()}


def to_json(studies: Sequence[Coverage], weights: Mapping[str, Mapping[str, Path]]) -> dict[str, Any]:
    """All numbers; `weights` are the files of each run's maps. Missing and infinite numbers are null."""
    return {
        "runs": [
            {
                "run": c.run,
                "totals": {k: _number(v) for k, v in c.totals.items()},
                "families": c.families,
                "maps": [
                    {
                        "axes": list(m.axes),
                        "divergence_bits": _number(m.bias.divergence),
                        "effective_rows": _number(m.bias.effective_rows),
                        "lost_share": _number(m.bias.lost_share),
                        "worst": worst_in_words(m),
                        "weights": str(weights[c.run][m.name].name) if m.name in weights.get(c.run, {}) else None,
                        "classes": _records(m.classes),
                        "multiplicity": _records(m.multiplicity),
                    }
                    for m in c.maps
                ],
                "missing_axes": c.missing_axes,
                "notes": c.notes,
                "paragraph": paragraph(c),
            }
            for c in studies
        ]
    }


def write_files(studies: Sequence[Coverage], folder: Path) -> None:
    """Write `coverage.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    journal.write_text_durably(folder / "coverage.md", "\n".join(card_text(c) for c in studies))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{k: _number(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _number(x: Any) -> Any:
    if x is None or x is pd.NA or (isinstance(x, float) and not math.isfinite(x)):
        return None
    return x.item() if hasattr(x, "item") else x
