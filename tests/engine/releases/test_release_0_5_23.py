"""What the adapter of 0.5.23 does itself, and that of 0.5.22 with it, on its own classes, without an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.engine.hooks import control, requests
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import live
from sglang_probe.engine.releases import release
from sglang_probe.engine.releases import release_0_5_23 as adapter
from tests.engine.made_session import SCHEDULER, made_request, make_session

pytestmark = pytest.mark.skipif(
    release().version not in ("0.5.22", "0.5.23"), reason="another release of SGLang is installed"
)


def request(cache: str | None = None) -> Any:
    req = made_request(**({"cache": cache} if cache else {}))
    requests.made(req, SCHEDULER)
    return req


def test_a_request_that_does_not_read_matches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_session(monkeypatch, EngineProbeConfig(run=tmp_path, asks=["cache"]))

    def original(_req: Any, _tree: Any, max_prefix_len: int | None = None) -> int | None:
        return max_prefix_len

    uses = (None, "read_only", "write_only", "off")
    assert [adapter.match_kv_cache(original, request(use), None) for use in uses] == [None, None, 0, 0]


def test_a_refused_command_is_refused_by_sglangs_own_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler_components.internal_state import UpdateRejected

    done: list[tuple[str, Any]] = []

    def carry_out(key: str, value: Any) -> None:
        if value == 13:
            raise control.Refused("no")
        done.append((key, value))

    monkeypatch.setattr(control, "carry_out", carry_out)
    handlers = adapter.update_handlers({"theirs": None}, None)
    assert set(handlers) == {"theirs", *control.KEYS}
    handlers[control.OPEN].validate(control.OPEN, 2)
    assert done == [(control.OPEN, 2)]
    with pytest.raises(UpdateRejected, match="probe_open: no"):
        handlers[control.OPEN].validate(control.OPEN, 13)


def test_provenance_is_added_to_what_others_return(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        has_additional_customized_info = True

        def should_build_additional_customized_info(self) -> bool:
            return False

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            return {"theirs": [1 for _ in reqs]}

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == "theirs"

    streamer = adapter.output_streamer_class(Theirs, SimpleNamespace())
    assert streamer is not None
    ours = streamer()
    assert not ours.should_build_additional_customized_info()
    monkeypatch.setattr(live, "anybody_asks", lambda: True)
    monkeypatch.setattr(live, "provenance_of", lambda reqs: [[r.rid] if r.finished() else [] for r in reqs])
    assert ours.should_build_additional_customized_info()
    reqs = [SimpleNamespace(rid="a", finished=lambda: False), SimpleNamespace(rid="b", finished=lambda: True)]
    assert ours.build_additional_customized_info(reqs) == {"theirs": [1, 1], "probe": [[], ["b"]]}
    assert ours.is_request_level_customized_info_key("probe")
    assert ours.is_request_level_customized_info_key("theirs")
    assert not ours.is_request_level_customized_info_key("other")
    assert adapter.output_streamer_class(Theirs, SimpleNamespace(rust_server=object())) is None
