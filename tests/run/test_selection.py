"""Which positions and heads are selected, by their place in the request alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sglang_probe.engine.capture.taps import Taps, head_columns
from sglang_probe.errors import ConfigError
from sglang_probe.run.selection import RowsConfig, Selected, selected_heads

Q, K, RESID = "blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k", "blocks.0.hook_resid_post"


def chosen(config: dict[str, Any], hook_point: str = RESID, points: tuple[str, ...] = (RESID,)) -> list[int]:
    """Kept positions of a request of 10 prompt tokens and 8 decode steps."""
    selected = Selected(RowsConfig.model_validate(config), points)
    at = np.arange(18)
    return np.flatnonzero(selected.positions(hook_point, at, np.full(18, 10))).tolist()


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, list(range(18))),
        ({"window": 3}, [7, 8, 9, *range(10, 18)]),
        ({"window": 3, "prefill": "all"}, list(range(18))),
        ({"window": 99, "decode": "none"}, list(range(10))),
        ({"prefill": "none", "decode": {"every": 3}}, [10, 13, 16]),
        ({"prefill": "none", "decode": {"steps": [1, 5, 50]}}, [10, 14]),
        ({"decode": "none"}, list(range(10))),
    ],
)
def test_positions(config: dict[str, Any], positions: list[int]) -> None:
    assert chosen(config) == positions


def test_a_site_or_a_hook_point_may_have_a_selection_of_its_own() -> None:
    config = {"window": 2, "decode": "none", "at": {"attn.hook_rot_k": {}, Q: {"prefill": "none"}}}
    points = ("hook_embed", Q, K, RESID)
    assert chosen(config, K, points) == list(range(18))
    assert chosen(config, Q, points) == list(range(10, 18))
    assert chosen(config, RESID, points) == [8, 9]


def test_the_embedding_is_selected_wherever_another_row_is() -> None:
    config = {"window": 2, "decode": "none", "at": {"attn.hook_rot_q": {"prefill": "none", "decode": {"every": 4}}}}
    assert chosen(config, "hook_embed", ("hook_embed", Q, RESID)) == [8, 9, 10, 14]
    assert chosen({**config, "at": {"hook_embed": {"decode": "none"}}}, "hook_embed", ("hook_embed", Q)) == list(
        range(10)
    )


def test_offsets_of_a_mixed_forward_are_those_of_its_positions() -> None:
    """A chunk of 4 to 10 of one prompt, a decode step of another request, and a retracted one computed again."""
    config = RowsConfig.model_validate({"window": 2, "decode": {"every": 2}})
    starts, ends, prompt_lens = [4, 12, 0], [10, 13, 5], [10, 10, 3]
    offsets = Selected(config, [RESID]).offsets(starts, ends, prompt_lens)[RESID]
    positions = [(r, p) for r, (s, e) in enumerate(zip(starts, ends, strict=True)) for p in range(s, e)]
    assert [positions[i] for i in offsets] == [(0, 8), (0, 9), (1, 12), (2, 1), (2, 2), (2, 3)]
    assert Selected(RowsConfig(), [RESID]).offsets(starts, ends, prompt_lens) == {}


def test_heads_are_columns_and_are_named() -> None:
    config = RowsConfig.model_validate({"heads": [1, 3], "at": {K: {}}})
    counts, numbers = selected_heads(config, {Q: [4, 2], K: [2, 2]})
    assert counts == {Q: [2, 2], K: [2, 2]}
    assert numbers == {Q: [1, 3]}
    taps = Taps([Q], capacity=4, columns={Q: head_columns([1, 3], 2)})
    taps.write(Q, torch.arange(16).view(2, 8))
    assert taps.take(2, replayed=False)[Q].tolist() == [[2, 3, 6, 7], [10, 11, 14, 15]]


def test_taken_rows_are_the_selected_ones_and_copies() -> None:
    taps = Taps([Q, K], capacity=4)
    for h in (Q, K):
        taps.write(h, torch.arange(4)[:, None])
    some, none = np.array([1, 3]), np.array([], dtype=np.int64)
    rows = taps.take(4, replayed=False, selected={Q: some, K: none})
    assert {h: x.tolist() for h, x in rows.items()} == {Q: [[1], [3]]}
    taps.write(Q, torch.zeros(4, 1, dtype=torch.int64))
    assert rows[Q].tolist() == [[1], [3]]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"decode": {"every": 0}}, "greater than 0"),
        ({"decode": {"steps": [0]}}, "greater than 0"),
        ({"heads": [3, 1]}, "ascending"),
        ({"at": {"attn.hook_z": {}}}, "neither a hook point nor one of"),
        ({"prefil": "none"}, "Extra inputs"),
    ],
)
def test_what_cannot_be_meant_is_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        RowsConfig.model_validate(config)


def test_a_head_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_heads` names head 2; `blocks\.0\.attn\.hook_rot_k` has 2"):
        selected_heads(RowsConfig(kv_heads=[0, 2]), {Q: [4, 2], K: [2, 2]})
