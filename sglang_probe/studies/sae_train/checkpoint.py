"""Checkpoints of a training whose rows are not kept: trainers of all dictionaries and the place in the stream, in one
folder that is replaced as a whole; and the rows to judge by, which are recorded once.

    checkpoint/<dictionary>/        what `Course.write` writes
    checkpoint/stream.json          step counts, sums, where the buffer is
    checkpoint/keys.parquet         request and position of each row that was in the buffer
    checkpoint/outputs.parquet      output tokens of the requests that they are of
    held-out/                       rows and tokens
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import load_file, save_file

from sglang_probe.run import journal
from sglang_probe.sae.harvested import Harvested
from sglang_probe.sae.stream import Buffer
from sglang_probe.sae.train import CHECKPOINT, Course, is_there, replaced

HELD_OUT = "held-out"
_STREAM, _KEYS, _OUTPUTS, _ROWS, _TOKENS = (
    "stream.json",
    "keys.parquet",
    "outputs.parquet",
    "rows.safetensors",
    "tokens",
)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    path: Path
    told: Mapping[str, Any]
    keys: pd.DataFrame
    outputs: Mapping[int, Sequence[int] | None]
    """Output tokens by number of the request."""
    held_out: Harvested


def write_held_out(folder: Path, rows: Harvested) -> None:
    """Keep the rows to judge by until the training ends."""
    with replaced(folder / HELD_OUT) as made:
        save_file({"rows": rows.x_ND.contiguous()}, made / _ROWS)
        rows.tokens.to_parquet(made / f"{_TOKENS}.parquet")
        told = {"left_out": rows.left_out.to_dict("records"), "norm_limit": rows.norm_limit}
        journal.write_text_durably(made / f"{_TOKENS}.json", json.dumps(told) + "\n")


def write(
    folder: Path,
    courses: Mapping[str, Course],
    buffer: Buffer,
    told: Mapping[str, Any],
    outputs: Mapping[int, Sequence[int] | None],
) -> None:
    """Replace the checkpoint."""
    at, keys = buffer.state()
    with replaced(folder / CHECKPOINT) as made:
        for name, course in courses.items():
            (made / name).mkdir()
            course.write(made / name)
        keys.to_parquet(made / _KEYS)
        frame = pd.DataFrame({"index": list(outputs), "output_ids": list(outputs.values())})
        frame.to_parquet(made / _OUTPUTS)
        journal.write_text_durably(made / _STREAM, json.dumps({**told, "buffer": at}) + "\n")


def read(folder: Path) -> Saved | None:
    """The checkpoint; None: there is none."""
    path = folder / CHECKPOINT
    if not is_there(path) or not is_there(folder / HELD_OUT):
        return None
    told = json.loads((path / _STREAM).read_text(encoding="utf-8"))
    frame = pd.read_parquet(path / _OUTPUTS)
    outputs = {
        int(i): None if ids is None else [int(t) for t in ids]
        for i, ids in zip(frame["index"], frame["output_ids"], strict=True)
    }
    return Saved(path, told, pd.read_parquet(path / _KEYS), outputs, _read_held_out(folder / HELD_OUT))


def delete(folder: Path) -> None:
    """Remove what is needed no longer."""
    for name in (CHECKPOINT, HELD_OUT):
        for left in (name, f".{name}.old", f".{name}.new"):
            shutil.rmtree(folder / left, ignore_errors=True)


def _read_held_out(path: Path) -> Harvested:
    told = json.loads((path / f"{_TOKENS}.json").read_text(encoding="utf-8"))
    left_out = pd.DataFrame(told["left_out"], columns=["reason", "segment", "rows"])
    tokens = pd.read_parquet(path / f"{_TOKENS}.parquet")
    return Harvested(load_file(path / _ROWS)["rows"], tokens, left_out, told["norm_limit"])
