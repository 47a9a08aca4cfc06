"""Kept sets come back from disk as they were, and a damaged or foreign file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from sglang_probe.errors import ProbeError
from sglang_probe.eviction import parse_method, parse_oracle, stack
from sglang_probe.eviction.keep import kept_of
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from tests.eviction.toy import KV_HEADS, LENGTH, STEPS, toy


def _random(steps: int, layers: int, heads: int, length: int, seed: int = 0) -> Kept:
    return Kept(torch.rand(steps, layers, heads, length, generator=torch.Generator().manual_seed(seed)) < 0.4)


@pytest.mark.parametrize("shape", [(1, 4, 2, 16), (3, 1, 5, 13), (1, 2, 2, 1), (7, 3, 2, 129)])
def test_sets_come_back_from_disk(tmp_path: Path, shape: tuple[int, int, int, int]) -> None:
    sets = {"a": _random(*shape), "snapkv 1/8 r0/1": _random(*shape, seed=1)}
    write_kept(tmp_path / "kept", sets, notes={"a": {"budget": 3}})
    file = KeptFile(tmp_path / "kept")
    assert set(file) == set(sets)
    for key, kept in sets.items():
        assert torch.equal(file[key].keep_SYGN, kept.keep_SYGN)
        assert np.array_equal(file.counts[key], kept.counts_SYG)
        assert file.shapes[key] == shape
    assert file.notes == {"a": {"budget": 3}}


def test_a_subset_holds_what_was_asked_and_no_more(tmp_path: Path) -> None:
    sets = {k: _random(1, 2, 2, 9, seed=i) for i, k in enumerate("abc")}
    write_kept(tmp_path / "kept", sets, notes={"a": 1, "b": 2})
    KeptFile(tmp_path / "kept").write_subset(tmp_path / "sub", ["b", "c", "b"])
    sub = KeptFile(tmp_path / "sub")
    assert sorted(sub) == ["b", "c"]
    assert sub.notes == {"b": 2}
    assert torch.equal(sub["c"].keep_SYGN, sets["c"].keep_SYGN)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write_kept(tmp_path / "kept", {"a": _random(1, 2, 2, 32)})
    with safe_open(tmp_path / "kept", framework="np") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    tensors["bits/a"][3] ^= 1
    save_file(tensors, tmp_path / "kept", metadata=metadata)
    with pytest.raises(ProbeError, match="`a` does not keep what the file says"):
        KeptFile(tmp_path / "kept")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"rows": np.zeros((2, 2))}, tmp_path / "rows")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ProbeError, match="holds no kept sets"):
        KeptFile(tmp_path / "rows")
    for name in ("text", "absent"):
        with pytest.raises(ProbeError, match=name):
            KeptFile(tmp_path / name)


@pytest.mark.parametrize("keep", [torch.ones(1, 2, 2, 4), torch.ones(2, 2, 4, dtype=torch.bool)])
def test_what_is_no_kept_set_is_refused(keep: torch.Tensor) -> None:
    with pytest.raises(ProbeError, match="a kept set is bool"):
        Kept(keep)


def test_a_selection_becomes_a_kept_set_layer_by_layer() -> None:
    layers = [toy(seed) for seed in range(3)]
    method = parse_method({"method": "snapkv", "window": 2})
    selections = [method.select(layer, 5) for layer in layers]
    kept = kept_of(selections)
    assert kept.keep_SYGN.shape == (1, 3, KV_HEADS, LENGTH)
    for i, selection in enumerate(selections):
        assert torch.equal(kept.keep_SYGN[0, i], selection.keep_GL)
    at_once = kept_of([method.select(stack(layers), 5)])
    assert torch.equal(at_once.keep_SYGN, kept.keep_SYGN)


def test_a_selection_by_step_holds_from_its_first_scored_step() -> None:
    oracle = parse_oracle("per_step")
    selection = oracle.select(toy(), 4)
    assert not selection.evicts
    kept = kept_of([selection], lead=2)
    assert len(kept.keep_SYGN) == STEPS + 2
    for p, t in ((LENGTH, 0), (LENGTH + 1, 0), (LENGTH + 2, 0), (LENGTH + 3, 1), (LENGTH + 99, STEPS - 1)):
        assert torch.equal(kept.at(p)[0], selection.keep_TGL[t])
