"""One captured graph against the embedding matrix and against the same forward without a graph.

Random tokens, all different, go through the graph twice and through the model once. Then every tap must have written
every element of every row, and nothing after the last row; `hook_embed` must be the embedding of the row's own token,
to the bit; and no row may differ from that of the eager forward by more than rounding: one that was shifted, exchanged,
left from the replay before, or baked into the graph as a constant, does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.errors import LedgerError
from sglang_probe.run.hook_points import EMBED

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-3}
"""Largest relative L2 difference of a row between replay and eager forward, by dtype of the rows. Another algorithm may
have been chosen for a product while the graph was captured; a row of another token differs by about 1."""

_ROWS = 1024
"""Rows that are compared at once. Prefill graphs have up to 8,192, and beside a KV pool little memory is left."""
_FILL = 0xFF
"""Every byte of the buffer before a forward: NaN in each of the three dtypes."""


@dataclass(frozen=True)
class GraphFigures:
    """What was found of one graph."""

    tokens: int
    worst: dict[str, float]
    """Largest relative difference of a row from the eager forward, by hook point."""
    equal: dict[str, float]
    """Share of rows that are equal to the bit."""


def check_graph(
    taps: GraphTaps,
    tokens: int,
    *,
    replay: Callable[[torch.Tensor], None],
    eager: Callable[[torch.Tensor], None],
    vocabulary: int,
    embedding_VD: torch.Tensor | None = None,
) -> GraphFigures:
    """Check the graph of so many tokens. Reads the device.

    Args:
        replay, eager: run these token ids `[tokens]`, int64 on the device of the taps, through the graph or without it.
        embedding_VD: None: this rank does not hold all of it.

    Raises:
        LedgerError: names hook point, graph, and row.
    """
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(tokens))
    ids = ids.repeat(-(-2 * tokens // vocabulary))[: 2 * tokens].to(taps.buffer.device)
    before = _filled(taps, tokens, lambda: replay(ids[:tokens]))
    rows = _filled(taps, tokens, lambda: replay(ids[tokens:]))
    taps.arm()
    eager(ids[tokens:])
    reference = taps.source(tokens, replayed=False)
    worst, equal = dict.fromkeys(taps.columns, 0.0), dict.fromkeys(taps.columns, 0.0)
    for name, column in taps.columns.items():
        for at in range(0, tokens, _ROWS):
            part = slice(at, min(at + _ROWS, tokens))
            got, expected = column.of(rows[part]).to(reference.device), column.of(reference[part])
            if name == EMBED and embedding_VD is not None:
                _refuse_other_tokens(got, embedding_VD[ids[tokens:][part]], tokens, at)
            difference = _difference(got, expected)
            worst[name] = max(worst[name], float(difference.max()))
            equal[name] += float((got == expected).all(1).sum()) / tokens
            if worst[name] > LIMITS[column.dtype]:
                row = int(difference.argmax())
                stale = bool((got[row].cpu() == column.of(before)[at + row]).all())
                off = f"it differs from the eager forward by {worst[name]:.2g}"
                why = "it is that of the replay before" if stale else off
                raise LedgerError(f"hook point {name} of the graph for {tokens} tokens: row {at + row} is wrong, {why}")
    taps.disarm()
    return GraphFigures(tokens, worst, equal)


def _filled(taps: GraphTaps, tokens: int, run: Callable[[], None]) -> torch.Tensor:
    """Rows of a replay into a buffer that held nothing, in host memory.

    Raises:
        LedgerError: not all of them were written, or more was.
    """
    taps.buffer.fill_(_FILL)
    run()
    for name, column in taps.columns.items():
        if (row := _first(column.of(taps.buffer[:tokens]).isnan().any(1))) is not None:
            raise LedgerError(f"hook point {name} of the graph for {tokens} tokens: row {row} was not written")
        beyond = taps.buffer[tokens:, column.start : column.end]
        if (row := _first((beyond != _FILL).any(1))) is not None:
            raise LedgerError(f"hook point {name} of the graph for {tokens} tokens: row {tokens + row} was written too")
    return taps.buffer[:tokens].to("cpu", copy=True)


def _refuse_other_tokens(got_ND: torch.Tensor, expected_ND: torch.Tensor, tokens: int, first: int) -> None:
    if (row := _first((got_ND != expected_ND.to(got_ND.dtype)).any(1))) is not None:
        raise LedgerError(
            f"hook point {EMBED} of the graph for {tokens} tokens: row {first + row} is not the embedding of its token"
        )


def _difference(got_ND: torch.Tensor, expected_ND: torch.Tensor) -> torch.Tensor:
    expected = expected_ND.float()
    return (got_ND.float() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)


def _first(wrong_N: torch.Tensor) -> int | None:
    """The first row that is wrong."""
    return int(wrong_N.int().argmax()) if bool(wrong_N.any()) else None
