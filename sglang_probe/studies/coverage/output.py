"""The study as files: `coverage.json` for programs, `coverage.md` for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.run import journal
from sglang_probe.studies.coverage.result import Coverage
from sglang_probe.studies.coverage.words import card_text, paragraph, worst_in_words


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


def write_files(studies: Sequence[Coverage], weights: Mapping[str, Mapping[str, Path]], folder: Path) -> None:
    """Write `coverage.json` and `coverage.md`."""
    data = json.dumps(to_json(studies, weights), indent=2, allow_nan=False)
    journal.write_text_durably(folder / "coverage.json", data + "\n")
    journal.write_text_durably(folder / "coverage.md", "\n".join(card_text(c) for c in studies))


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{k: _number(v) for k, v in row.items()} for row in frame.to_dict("records")]


def _number(x: Any) -> Any:
    if x is None or x is pd.NA or (isinstance(x, float) and not math.isfinite(x)):
        return None
    return x.item() if hasattr(x, "item") else x
