"""docs/evidence/benchmarks.md: one section a benchmark, each written by its own script."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from sglang_probe.studies.row_counts.products import cpu_name

_HEAD = "# Benchmarks\n\nWritten by `make bench`; do not edit.\n"


def write_section(path: Path, heading: str, text: str) -> None:
    """Replace the section of that heading, or add it; the others stay."""
    _, *sections = re.split(r"^## ", path.read_text() if path.exists() else _HEAD, flags=re.MULTILINE)
    by_heading = {s.split("\n", 1)[0]: s.split("\n", 1)[1].strip() for s in sections}
    by_heading[heading] = text.strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEAD + "".join(f"\n## {h}\n\n{t}\n" for h, t in by_heading.items()))


def machine() -> str:
    """Date, processor and Python."""
    cores = f"{os.cpu_count()} cores of {cpu_name()}"
    return f"{datetime.now(UTC):%Y-%m-%d}, {cores}, no GPU, Python {platform.python_version()}"


def middle_half(ratios: Sequence[float]) -> str:
    """The median of ratios, and their quartiles."""
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
