"""Rows of the same tokens at the same positions, by the number of rows of the forward that computed them.

Bits are compared with bits, so there is nothing to estimate: two row counts are in one class if every row of theirs is
bit-identical, in every text. The size of the differences is the relative L2 to the text computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.stats.distance import row_distance
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.studies.ab.plan import REPEAT
from sglang_probe.studies.base import records
from sglang_probe.studies.row_counts.products import read_products
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

Array = np.ndarray[Any, Any]

WHOLE, TAILS, DECODE = "whole", "tails", "decode"


@dataclass(frozen=True)
class RowCountsResult:
    """Everything the report and the terminal show; frames are tidy."""

    name: str
    distances: pd.DataFrame
    """hook_point, phase, rows, texts, positions, identical (share), l2 with low and high over texts, l2_max: against
    the text computed whole. Phase `prefix`: the cached positions; `repeat`: the whole text again, the floor."""
    classes: pd.DataFrame
    """hook_point, class, prefill, decode (row counts in words): row counts with equal bits at the first position after
    the prefix, in every text. `whole` is in the class that the whole text is in."""
    products: pd.DataFrame
    """product, inputs, outputs, rows, class: `products.row_classes` on the machine that recorded."""
    machine: Mapping[str, str]
    texts: int
    prefix: int
    whole: int
    """Rows of the forward of a whole text."""
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
            "prefix_tokens": self.prefix,
            "rows_of_a_whole_text": self.whole,
            "dtype": self.manifest["rows_dtype"],
            "machine": dict(self.machine),
            **{k: records(frame) for k, frame in self.tables().items()},
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table."""
        return {"distances": self.distances, "classes": self.classes, "products": self.products}


def study_row_counts(
    runs: Mapping[str, Run], folder: Path, prefix: int, name: str, *, tell: Callable[[str], None] = lambda _: None
) -> RowCountsResult:
    """Compare all rows with those of the whole texts.

    Args:
        runs: by name: `whole`, its repeat, `tails`, `decode-<n>`.
        folder: of the study, with `products.json`.
        prefix: cached tokens before the counted rows.

    Raises:
        ProbeError: a whole text was computed in pieces.
    """
    checks, places = {}, {}
    for run_name, run in runs.items():
        tell(f"reading and verifying {run_name}")
        checks[run_name] = verify(run)
        places[run_name] = _computed(run, run_name, prefix)
    whole = places[WHOLE]
    sizes = whole["rows"].unique()
    if len(sizes) != 1:
        raise ProbeError(f"the whole texts were computed in forwards of {sorted(sizes)} rows, not in one each")
    # Of every row that is compared, which row of the whole texts it should be.
    number = pd.Series(np.arange(len(whole)), index=pd.MultiIndex.from_frame(whole[["text", "position"]]))
    same_as = {k: number.loc[pd.MultiIndex.from_frame(w[["text", "position"]])].to_numpy() for k, w in places.items()}
    distances, classes = [], []
    for hook_point in runs[WHOLE].hook_points:
        tell(f"comparing {hook_point}")
        reference = _rows(runs[WHOLE], hook_point, whole)
        first: dict[tuple[str, int], dict[int, set[bytes]]] = {}
        for run_name, where in places.items():
            rows = reference if run_name == WHOLE else _rows(runs[run_name], hook_point, where)
            _note_bits(first, where, rows, prefix)
            if run_name != WHOLE:
                found = _distances(where, rows, reference[same_as[run_name]])
                distances.append(found.assign(hook_point=hook_point))
        classes.append(classes_of(first, int(sizes[0])).assign(hook_point=hook_point))
    machine, products = read_products(folder)
    columns = ["hook_point", "phase", "rows", "texts", "positions", "identical", "l2", "low", "high", "l2_max"]
    return RowCountsResult(
        name=name,
        distances=pd.concat(distances, ignore_index=True)[columns],
        classes=pd.concat(classes, ignore_index=True)[["hook_point", "class", "prefill", "decode", "whole"]],
        products=products,
        machine=machine,
        texts=int(whole["text"].nunique()),
        prefix=prefix,
        whole=int(sizes[0]),
        checks=checks,
        manifest=runs[WHOLE].manifest,
    )


def classes_of(first: Mapping[tuple[str, int], Mapping[int, set[bytes]]], whole: int) -> pd.DataFrame:
    """Row counts whose rows have equal bits in every text.

    Args:
        first: by phase and row count, of each text the distinct rows of one position.
        whole: row count of a whole text.

    Returns:
        class (1, 2, ...; in the order of the smallest count), prefill, decode (row counts in words, e.g. `1, 4-64`),
        whole (whether the whole texts are in it). A row count that gives one text different rows is a class `varies`.
    """
    members: dict[Any, dict[str, list[int]]] = {}
    for (phase, rows), by_text in sorted(first.items(), key=lambda item: (item[0][1], item[0][0])):
        varies = any(len(bits) > 1 for bits in by_text.values())
        key = "varies" if varies else tuple(sorted((text, next(iter(bits))) for text, bits in by_text.items()))
        members.setdefault(key, {}).setdefault(phase, []).append(rows)
    numbers = iter(range(1, len(members) + 1))
    return pd.DataFrame(
        [
            {
                "class": "varies" if key == "varies" else str(next(numbers)),
                "prefill": in_words([n for n in found.get(schema.PREFILL, []) if n != whole]),
                "decode": in_words(found.get(schema.DECODE, [])),
                "whole": whole in found.get(schema.PREFILL, []),
            }
            for key, found in members.items()
        ],
        columns=["class", "prefill", "decode", "whole"],
    )


def in_words(counts: Sequence[int]) -> str:
    """Sorted numbers as ranges: `1, 4-7`. Numbers are one range as long as each is the next one."""
    ranges: list[list[int]] = []
    for n in sorted(set(counts)):
        if ranges and n == ranges[-1][1] + 1:
            ranges[-1][1] = n
        else:
            ranges.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _computed(run: Run, name: str, prefix: int) -> pd.DataFrame:
    """Computed positions with a row: text, position, phase, rows (of their forward), row. Of runs that compute a
    prefix only to decode after it, the decoded positions."""
    tokens = run.tokens()
    tokens = tokens[(tokens["status"] == schema.COMPUTED) & (tokens["row"] >= 0)]
    tokens = tokens[tokens["phase"].isin((schema.PREFILL, schema.DECODE))]
    if name.startswith(DECODE):
        tokens = tokens[tokens["phase"] == schema.DECODE]
    forwards = run.forwards().set_index("forward_id")
    rows = (forwards["prefill_tokens"] + forwards["decode_tokens"]).loc[tokens["forward_id"]].to_numpy()
    phase = tokens["phase"].astype(str)
    if name == TAILS:
        phase = phase.where(tokens["position"] >= prefix, "prefix")
    elif name == WHOLE + REPEAT:
        phase = pd.Series("repeat", index=tokens.index)
    text = tokens["rid"].str.partition("~")[0].str.partition("-")[0]
    return pd.DataFrame(
        {"text": text, "position": tokens["position"], "phase": phase, "rows": rows, "row": tokens["row"]}
    ).reset_index(drop=True)


def _rows(run: Run, hook_point: str, where: pd.DataFrame) -> torch.Tensor:
    return run.rows(hook_point, where["row"].to_numpy())


def _note_bits(first: dict[tuple[str, int], dict[int, set[bytes]]], where: pd.DataFrame, rows: Any, at: int) -> None:
    """Add the bits of position `at`, by phase, row count and text."""
    for i in np.flatnonzero((where["position"] == at) & where["phase"].isin((schema.PREFILL, schema.DECODE))):
        place = where.iloc[i]
        bits = rows[i].contiguous().view(torch.uint8).numpy().tobytes()
        by_text = first.setdefault((str(place["phase"]), int(place["rows"])), {})
        by_text.setdefault(place["text"], set()).add(bits)


def _distances(where: pd.DataFrame, rows: torch.Tensor, same: torch.Tensor) -> pd.DataFrame:
    """By phase and row count: share of identical rows and relative L2, its interval over texts."""
    l2 = row_distance(rows, same)[0]
    frame = where.assign(l2=l2, identical=(rows == same).all(dim=1).numpy())
    out = []
    for (phase, count), cell in frame.groupby(["phase", "rows"], sort=True):
        by_text = cell.groupby("text")["l2"].mean().to_numpy()
        found = mean_intervals(by_text[:, None], bounds=(0.0, np.inf))
        out.append(
            {
                "phase": phase,
                "rows": count,
                "texts": len(by_text),
                "positions": len(cell),
                "identical": cell["identical"].mean(),
                "l2": by_text.mean(),
                "low": found.low[0],
                "high": found.high[0],
                "l2_max": cell["l2"].max(),
            }
        )
    return pd.DataFrame(out)
