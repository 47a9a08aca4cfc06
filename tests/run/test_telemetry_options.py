"""What may be said of telemetry together."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.run.telemetry_options import TelemetryConfig, check_lists


def parse(**given: Any) -> TelemetryConfig:
    return parse_config(given, TelemetryConfig, where="test")


def test_lists_have_no_top_positions_and_no_jump_and_what_is_written_can_be_read_again() -> None:
    found = parse(by="lists", every=2)
    assert (found.top_k, found.memory, found.options().top_k) == (0, 0, 0)
    assert parse(**found.model_dump(mode="json")) == found
    assert (parse().by, parse().top_k, parse().memory) == ("kernel", 8, 4)


@pytest.mark.parametrize("name", ["top_k", "memory"])
def test_what_only_the_kernel_gives_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` needs `by: kernel`"):
        parse(by="lists", **{name: 4})
    with pytest.raises(ConfigError, match="at least 1"):
        parse(**{name: 0})
    with pytest.raises(ConfigError, match="at least 1"):
        parse(**{name: "0"})  # pydantic reads it as a number
    with pytest.raises(ConfigError):
        parse(**{name: -1})


def test_lists_are_of_an_accelerator() -> None:
    check_lists(parse(by="lists"), in_graphs=True)
    check_lists(parse(), in_graphs=False)
    with pytest.raises(UnsupportedError, match="this engine is on a CPU"):
        check_lists(parse(by="lists"), in_graphs=False)
