"""Paths whose accounting is not proved are refused by name."""

from __future__ import annotations

import re

import pytest

from sglang_probe.engine.hooks.supported import _REFUSED, refuse_unsupported
from sglang_probe.engine.releases import release
from sglang_probe.errors import UnsupportedError

EVERY = {**_REFUSED, **release().refused}


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("speculative_algorithm", "EAGLE", "speculative decoding"),
        ("pp_size", 2, "pipeline parallelism"),
        ("enable_dp_attention", True, "data-parallel attention"),
        ("attn_cp_size", 2, "context parallelism"),
        ("enable_hierarchical_cache", True, "hierarchical cache"),
        ("disaggregation_mode", "prefill", "disaggregation"),
        ("enable_torch_compile", True, "torch.compile"),
        ("enable_lora", True, "LoRA"),
    ],
)
def test_refused(argument: str, value: object, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        refuse_unsupported({argument: value})


def test_defaults_and_ordinary_arguments_pass() -> None:
    refuse_unsupported(
        {"tp_size": 2, "dp_size": 2, "speculative_algorithm": None, "chunked_prefill_size": 64, "enable_lora": None}
    )


@pytest.mark.parametrize("argument", sorted(EVERY))
def test_every_entry_refuses_what_is_not_fine(argument: str) -> None:
    fine, what = EVERY[argument]
    on: object = {int: 2, bool: True}.get(type(fine), "something")
    with pytest.raises(UnsupportedError, match=re.escape(what)):
        refuse_unsupported({argument: on})
    refuse_unsupported({argument: fine})
