"""Reading the columns of a figure from a frame; what could only be drawn by guessing raises `ValueError`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from sglang_probe.report.numbers import is_missing


def select(frame: pd.DataFrame, columns: list[str], unique: list[str], bounds: Sequence[str] = ()) -> pd.DataFrame:
    """The columns, after checking that they exist and that no key occurs twice; of `bounds`, the ends of an interval
    that may not have been computed, absent ones are missing values."""
    if frame.empty:
        return pd.DataFrame({name: pd.Series(dtype="float64") for name in [*columns, *bounds]})
    frame = frame.assign(**{name: math.nan for name in bounds if name not in frame.columns})
    columns = [*columns, *bounds]
    absent = [name for name in columns if name not in frame.columns]
    if absent:
        raise ValueError(f"no column {absent[0]!r}; the frame has {', '.join(map(str, frame.columns))}")
    data = frame[columns].reset_index(drop=True)
    twice = data[data.duplicated(unique)]
    if len(twice):
        key = ", ".join(f"{name}={twice.iloc[0][name]!r}" for name in unique)
        raise ValueError(f"two values for {key}; aggregate the frame first")
    return data


def interval_columns(low: str | None, high: str | None) -> list[str]:
    """The two columns of an interval, or none."""
    if low is None and high is None:
        return []
    if low is None or high is None:
        raise ValueError("an interval needs both `low` and `high`")
    return [low, high]


def distinct(column: pd.Series) -> list[str]:
    """Distinct values in order of appearance; of a categorical, in the order of its categories."""
    values = set(column)
    if isinstance(column.dtype, pd.CategoricalDtype):
        return [str(v) for v in column.cat.categories if v in values]
    return [str(v) for v in dict.fromkeys(column)]


def numbers(data: pd.DataFrame, name: str) -> list[float]:
    """The column as floats, missing values as NaN."""
    values = [math.nan if is_missing(v) else float(v) for v in data[name]]
    if any(math.isinf(v) for v in values):
        raise ValueError(f"column {name!r} holds an infinite value, which cannot be drawn")
    return values
