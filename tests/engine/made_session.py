"""A session that believes that it records, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.taps import Taps
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import Instrument
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.session import Session


def make_session(
    monkeypatch: pytest.MonkeyPatch, config: EngineProbeConfig, *kinds: type[Instrument], opened: bool = True
) -> Session:
    """The session of this process, with these instruments; by default those that the configuration wants."""
    running = Session(config, kinds or None)
    if opened:
        monkeypatch.setattr(running, "recorder", object())
    monkeypatch.setattr(guard, "session", running)
    return running


def set_taps(running: Session, taps: Taps | GraphTaps) -> None:
    """What `Rows.attach` does once a model is loaded."""
    rows = running.of(Rows)
    assert rows is not None
    rows.taps = taps


def made_request(**probe: Any) -> Any:
    """A `Req` as SGLang makes it, of 16 tokens, that asks this of the probe."""
    req = SimpleNamespace(
        rid="r",
        sampling_params=SimpleNamespace(custom_params={"probe": probe} if probe else None, max_new_tokens=4),
        origin_input_ids=[0] * 16,
        skip_radix_cache_insert=False,
        to_finish=None,
        refused=None,
    )
    req.set_finish_with_abort = lambda message: setattr(req, "refused", message)
    return req


SCHEDULER = SimpleNamespace(model_config=SimpleNamespace(context_len=64, vocab_size=100))
"""As far as a request is checked against it."""
