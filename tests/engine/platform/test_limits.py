"""What is refused on the reference platform of each release."""

from __future__ import annotations

import pytest

from sglang_probe.engine.platform import limits
from sglang_probe.engine.releases import load
from sglang_probe.errors import UnsupportedError


@pytest.mark.parametrize("name", ["tp_size", "dp_size"])
def test_several_ranks_are_refused_where_the_release_cannot_start_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "release", lambda: load("0.5.23"))
    limits.refuse_without_gpu({name: 2})
    monkeypatch.setattr(limits, "release", lambda: load("0.5.17"))
    limits.refuse_without_gpu({name: 1})
    with pytest.raises(UnsupportedError, match=f"`{name}: 2` cannot run on this machine: SGLang 0.5.17"):
        limits.refuse_without_gpu({name: 2})
