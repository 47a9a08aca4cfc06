"""What is refused on an accelerator, and how rows travel with a result of SGLang's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import accelerator
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.session import Session
from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.engine.releases import release
from sglang_probe.errors import LedgerError, UnsupportedError
from tests.engine.made_session import make_session, set_taps


def test_cuda_and_the_cpu_are_not_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    accelerator.check_device("cuda")  # with telemetry or without; a certificate is asked later
    accelerator.check_device("cpu")


@pytest.mark.parametrize(
    ("device", "hip", "named"), [("xpu", None, "xpu"), ("npu", None, "npu"), ("cuda", "7", "rocm")]
)
def test_other_accelerators_are_refused_whatever_is_asked(
    device: str, hip: str | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(UnsupportedError, match=f"`{named}` is not supported"):
        accelerator.check_device(device)


def test_the_megakernel_is_refused_by_name() -> None:
    accelerator.check_server(SimpleNamespace(enable_nvidia_megakernel=False))
    with pytest.raises(UnsupportedError, match="enable_nvidia_megakernel"):
        accelerator.check_server(SimpleNamespace(enable_nvidia_megakernel=True))


@pytest.mark.reviewed("accelerator rows")
def test_a_release_without_the_channel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator.check_channel()
    monkeypatch.setattr(type(release()), "row_channel", "sglang.srt.managers.no_such_output")
    with pytest.raises(UnsupportedError, match="no_such_output"):
        accelerator.check_channel()


auxiliary = pytest.mark.skipif(
    not release().row_channel.endswith("auxiliary_output"),
    reason="rows travel another way on this release (tests/releases)",
)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    running = make_session(monkeypatch, EngineProbeConfig(run=tmp_path, simulated_graphs=True), Rows)
    set_taps(running, GraphTaps({"h": (2, torch.float32)}, capacity=4, device="cpu"))
    return running


def _taps(running: Session) -> GraphTaps:
    rows = running.of(Rows)
    assert rows is not None
    assert isinstance(rows.taps, GraphTaps)
    return rows.taps


def _forward(running: Session, value: float) -> ForwardPlan:
    """A forward of two tokens whose rows are `value`, as far as its rows are on the way."""
    plan = ForwardPlan(1, "decode", ["a", "b"], [1, 1], [2, 2], [True, True], [0, 0], [1, 1], [None, None], slots=2)
    _taps(running).arm()
    _taps(running).write("h", torch.full((2, 2), value))
    plan.travelling["rows"] = _taps(running).snapshot(2, replayed=False)
    running.plan = plan
    return plan


def _result(**fields: Any) -> Any:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.managers.utils import GenerationBatchResult

    return GenerationBatchResult(logits_output=LogitsProcessorOutput(next_token_logits=None), **fields)


def _copied(result: Any) -> None:
    """What SGLang's scheduler does after the forward, and with the result."""
    result.copy_auxiliary_output_to_cpu()
    result.auxiliary_host_output.consume(None, [])


@auxiliary
@pytest.mark.reviewed("accelerator rows")
def test_rows_travel_with_the_result_of_their_forward(recording: Session) -> None:
    plans, results = [], []
    for value in (1.0, 2.0):  # both launched before the first is processed
        plans.append(_forward(recording, value))
        results.append(accelerator.forward_batch_generation(lambda *_: _result(), None, None))
    for plan, result, value in zip(plans, results, (1.0, 2.0), strict=True):
        with pytest.raises(LedgerError, match="had not arrived"):
            plan.travelling["rows"].finish()
        _copied(result)
        assert plan.travelling["rows"].finish()["h"].tolist() == [[value] * 2] * 2
    assert recording.fault is None


@auxiliary
@pytest.mark.reviewed("accelerator rows")
def test_rows_join_after_a_delayed_sample_which_resets_the_channel(recording: Session) -> None:
    """SGLang delays the sample of constrained requests (`ModelRunner.sample` begins by clearing the field)."""

    def sample() -> Any:
        result.logits_output.auxiliary_device_output = None
        return result

    plan, result = _forward(recording, 3.0), _result()
    result.delay_sample_func = sample
    assert accelerator.forward_batch_generation(lambda *_: result, None, None) is result
    recording.plan = None  # the launch is over
    assert result.delay_sample_func() is result
    _copied(result)
    assert plan.travelling["rows"].finish()["h"].tolist() == [[3.0] * 2] * 2


@auxiliary
@pytest.mark.reviewed("accelerator rows")
def test_what_another_plugin_attached_arrives_too(recording: Session) -> None:
    consumed = []

    class Other:
        def copy_to_host(self, _copy: Any) -> Other:
            return self

        def consume(self, *_: Any) -> None:
            consumed.append(True)

    plan, result = _forward(recording, 4.0), _result()
    result.logits_output.auxiliary_device_output = Other()
    accelerator.forward_batch_generation(lambda *_: result, None, None)
    _copied(result)
    assert consumed == [True]
    assert plan.travelling["rows"].finish()["h"].tolist() == [[4.0] * 2] * 2


@auxiliary
@pytest.mark.reviewed("accelerator rows")
def test_a_fault_on_the_way_stops_the_recording_and_not_the_request(recording: Session) -> None:
    plan = _forward(recording, 5.0)
    plan.travelling["rows"].send(torch.clone)  # a second send has nothing to send
    result = accelerator.forward_batch_generation(lambda *_: _result(), None, None)
    _copied(result)
    assert recording.fault is not None
    assert "_copy" in recording.fault


def test_taps_write_while_graphs_are_captured_which_is_before_the_recording_opens(recording: Session) -> None:
    recording.recorder = None
    write = guard.tapping(lambda n: _taps(recording).write("h", torch.ones(n, 2)))
    write(4)
    accelerator.check_captured(None, None, None, 4)
    assert recording.fault is None
    accelerator.check_captured(None, None, None, 4)  # the next graph was captured without the tap
    assert recording.fault is not None
    assert "not part of the graph captured for 4 tokens" in recording.fault


def test_a_warm_up_is_no_capture(recording: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang calls the hook after two forwards too that only warm a shape up."""
    monkeypatch.setattr(GraphTaps, "warming_up", True)
    accelerator.check_captured(None, None, None, 4)  # no tap has to have fired
    _taps(recording).write("h", torch.ones(4, 2))
    accelerator.check_captured(None, None, None, 4)
    assert recording.fault is None
    monkeypatch.setattr(GraphTaps, "warming_up", False)
    accelerator.check_captured(None, None, None, 4)  # what a warm-up wrote is not in the graph
    assert recording.fault is not None
    assert "not part of the graph captured for 4 tokens" in recording.fault
