"""The offline grid in pieces says what it says in one: every prompt alone decides its numbers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch

from sglang_probe.eviction import Layer
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.studies.evict.asked import KeptSets
from sglang_probe.studies.evict.controls import other_requests_queries
from sglang_probe.studies.evict.grid import Entry, Trivial, entries_of
from sglang_probe.studies.evict.layers import Batch, split
from sglang_probe.studies.evict.offline import Offline, run_offline
from sglang_probe.studies.evict.pieces import merge
from tests.eviction.lab.test_offline import CONTEXT, batch

TRIVIAL = Trivial(sinks=1, window=2)


def some(whole: Batch, start: int, end: int) -> Batch:
    """Some requests of a batch."""
    fields = {}
    for name in Layer.__dataclass_fields__:
        value = getattr(whole.layer, name)
        fields[name] = value[start:end] if isinstance(value, torch.Tensor) else value
    future = whole.layer.future
    assert future is not None
    parts = (None if x is None else x[start:end] for x in (future.q_THD, future.k_TGD, future.v_TGD))
    fields["future"] = replace(future, **dict(zip(("q_THD", "k_TGD", "v_TGD"), parts, strict=True)))
    return Batch(whole.rids[start:end], CONTEXT, Layer(**fields), whole.itemsize)


def tables(found: Batch, controls: list[Entry]) -> tuple[dict[str, pd.DataFrame], KeptSets]:
    """What a piece keeps."""
    out, kept = Offline(), KeptSets()
    entries = entries_of(["snapkv", "pyramidkv", {"method": "snapkv", "window": 99}], ["static_mean"], TRIVIAL, 0)
    budgets: list[int | Fraction] = [Fraction(1, 2), 2]
    run_offline("toy", [found], entries, budgets, list(Protocol), TRIVIAL, controls_of=controls, out=out, keep=kept.add)
    rows, heads, excluded = out.frames()
    counts = pd.DataFrame({"asserted": [out.asserted]})
    return {"offline": rows, "heads": heads, "excluded": excluded, "counts": counts}, kept


def test_pieces_put_together_are_the_grid_of_all_prompts() -> None:
    whole = batch(5)
    one, kept = tables(whole, [])
    pieces = [tables(some(whole, *ends), []) for ends in ((0, 2), (2, 5))]
    merged, expected = merge([t for t, _ in pieces]), merge([one])
    assert len(expected["excluded"])
    key = ["task", "protocol", "policy", "budget"]
    for name, by in {
        "offline": [*key, "rid"],
        "heads": [*key, "layer", "head"],
        "excluded": [*key, "reason"],
    }.items():
        a, b = (f[name].sort_values(by).reset_index(drop=True) for f in (merged, expected))
        pd.testing.assert_frame_equal(a, b, rtol=1e-6)
    assert merged["counts"]["asserted"].sum() == expected["counts"]["asserted"].sum()
    cells = pd.concat([k.cells for _, k in pieces])
    sources = [*key, "source", "entries"]
    pd.testing.assert_frame_equal(
        cells[sources].sort_values(sources).reset_index(drop=True),
        kept.cells[sources].sort_values(sources).reset_index(drop=True),
    )


def test_kept_sets_of_pieces_get_keys_of_their_own(tmp_path: Path) -> None:
    whole = batch(4)
    together = KeptSets()
    for i, ends in enumerate(((0, 2), (2, 4))):
        _, kept = tables(some(whole, *ends), [])
        kept.write(tmp_path / f"{i}.safetensors")
        together.extend(tmp_path / f"{i}.safetensors", kept.cells)
    assert together.cells["key"].is_unique
    assert set(together.cells["source"]) == set(whole.rids)


@pytest.mark.parametrize(("n", "most"), [(0, 4), (1, 4), (2, 2), (3, 2), (5, 2), (5, 3), (24, 5), (64, 64), (65, 64)])
def test_groups_are_small_and_none_is_a_lone_prompt(n: int, most: int) -> None:
    rids = [f"r{i}" for i in range(n)]
    parts = [list(p) for p in split(rids, most)]
    assert [r for p in parts for r in p] == rids
    assert max(map(len, parts)) <= max(most, 3)
    assert n < 2 or min(map(len, parts)) >= 2


def test_a_lone_prompt_would_be_its_own_control() -> None:
    for n, same in ((1, True), (2, False)):
        layer = batch(n).layer
        assert torch.equal(other_requests_queries(layer).q_NHD, layer.q_NHD) is same
