"""Parts that the pages of all studies share: what was measured on what, why to believe it, effect beside floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sglang_probe.report.page import Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.verify.check import Check

Facts = list[tuple[str, str]]

VERDICT = Column("verdict")
EFFECT = Column("effect", "effect (floor)", "scientific", beside="floor")
EXCESS = Column(header="effect minus floor, 95 %", kind="scientific", bounds=("excess_low", "excess_high"))
Q = Column("q", "q, Benjamini-Hochberg", "decimal")
IDENTICAL = Column("identical_effect", "bit-identical (floor)", "percent", beside="identical_floor")
POSITIONS = Column("positions")
HOOK_POINT = Column("hook_point")

SAME_ORDER = Column("same_order", "in the same order (bit-identical)", "scientific", beside="identical_same_order")

FLOOR = (
    "Compare each effect with the floor: the difference between two runs of the same arm. Effect and floor are both "
    "between runs that submitted the requests in different orders, over the same positions, so that they are alike if "
    "the policy does nothing."
)
ALARMED = (
    "two runs of one arm differ more than runs of two arms across the same change of order. No policy can do that; "
    "look for something else in which the runs differ, and do not use the verdicts"
)


def only(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """Rows whose columns have these values; a tuple or list: one of them. A frame without rows stays one."""
    for column, value in where.items() if len(frame) else ():
        frame = frame[frame[column].isin(value if isinstance(value, list | tuple) else [value])]
    return frame


def in_points(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """With the shares of these columns, and the ends of their intervals, in percentage points (kind `points`)."""
    found = [c for n in names for c in (n, f"{n}_low", f"{n}_high") if c in frame.columns]
    return frame.assign(**{c: 100 * frame[c] for c in found})


def deepest(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the last hook point; hook points are in the order of the model."""
    return frame[frame["hook_point"] == frame["hook_point"].iloc[-1]] if len(frame) else frame


MANY_LAYERS = 8
"""With more of them, figures have layers on an axis in place of a curve or a row for each, and maps are folded."""


def with_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the residual stream (or of whatever site most layers have), with the number of the layer as `layer`;
    none where there are no more than `MANY_LAYERS`, whose hook points are shown by name."""
    if frame.empty:
        return frame
    found = frame["hook_point"].str.extract(r"^blocks\.(?P<layer>\d+)\.(?P<site>.+)$")
    known = frame.assign(**found)[found["site"].notna().to_numpy()]
    if known.empty:
        return known
    site = known.groupby("site", sort=False)["layer"].nunique().idxmax()
    known = known[known["site"] == site].astype({"layer": int})
    return known.sort_values("layer", kind="stable") if known["layer"].nunique() > MANY_LAYERS else known.iloc[:0]


def row_of_largest(frame: pd.DataFrame, column: str, *, least: bool = False) -> pd.Series | None:
    """The row with the largest (or least) value; None if there is no value."""
    known = frame[frame[column].notna()] if len(frame) else frame
    if not len(known):
        return None
    at = known[column].to_numpy().argmin() if least else known[column].to_numpy().argmax()
    return known.iloc[int(at)]


def facts(manifest: Mapping[str, Any], *more: tuple[str, str]) -> Facts:
    """Model, engine, what a study adds, and when it was recorded. A live segment says of the model only its name, and
    nothing of the dtype of its rows."""
    m, v = manifest["model"], manifest["versions"]
    shape = f" ({m['architecture']}, {m['layers']} layers)" if "architecture" in m else ""
    rows = f", rows in {dtype}" if (dtype := manifest.get("rows_dtype")) else ""
    return [
        ("model", f"{m['name']}{shape}{rows}"),
        ("engine", f"SGLang {v['sglang']}, torch {v['torch']}"),
        *more,
        ("recorded", manifest["created"]),
    ]


def footer(manifest: Mapping[str, Any], text: str = "Every number was measured in the runs named here.") -> str:
    """The version of the probe, and where the numbers come from."""
    return f"sglang-probe {manifest['versions']['sglang-probe']}. {text}"


def verdicts(*by: Column) -> list[Column]:
    """Columns of a floor table: what the row is, and the verdict with what it rests on."""
    return [*by, VERDICT, EFFECT, EXCESS, Q, SAME_ORDER, IDENTICAL, POSITIONS]


def checks_in_words(checks: Mapping[str, Sequence[Check]]) -> str:
    """`9 checks in each of 4 runs: all hold`, or how many do not."""
    every = [c for mine in checks.values() for c in mine]
    sizes = {len(mine) for mine in checks.values()}
    runs = f"{len(checks)} runs" if len(checks) > 1 else "1 run"
    told = f"{sizes.pop()} checks in each of {runs}" if len(sizes) == 1 else f"{len(every)} checks in {runs}"
    failed = sum(not c.holds for c in every)
    return f"{told.replace('each of 1 run', '1 run')}: " + (f"{failed} violated" if failed else "all hold")


def proof(checks: Mapping[str, Sequence[Check]], more: str = "") -> Section:
    """The invariants of the ledger over all runs: a sentence if they hold, the violations if not."""
    rows = [{"run": run, "check": c.name, "violation": c.violation} for run, mine in checks.items() for c in mine]
    failed = pd.DataFrame([r for r in rows if r["violation"] is not None], columns=["run", "check", "violation"])
    covered: dict[str, dict[str, Any]] = {}
    for mine in checks.values():
        for c in mine:
            row = covered.setdefault(c.name, {"check": c.name, "covered": 0, "unit": c.unit, "claim": c.claim})
            row["covered"] += c.covered
    return Section(
        heading="Why to believe it",
        text=f"{checks_in_words(checks)[0].upper()}{checks_in_words(checks)[1:]}. They are the invariants of the "
        "ledger, checked on the files of each run; `sglang-probe verify RUN` repeats them on any machine, without "
        f"SGLang. {more}",
        tables=[
            *([Table(failed, "Violated")] if len(failed) else []),
            Table(pd.DataFrame(covered.values()), "What each check covers, over all runs", long=True),
        ],
        notes=["**At least one invariant is violated. Do not use these numbers.**"] if len(failed) else [],
    )
