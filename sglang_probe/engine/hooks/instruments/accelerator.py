"""Taps on an accelerator: set up before graphs are captured, read through SGLang's own channel.

What came of it on a GPU: docs/evidence/gpu-results.md.

SGLang: `model_executor/runner/decode_cuda_graph_runner.py` (one graph per batch size, captured after
`ModelRunner.load_model`; `capture_tail_hooks` run at the end of each), `prefill_cuda_graph_runner.py` (graphs in
segments, with attention between them). How rows leave is the release's own (`Release.row_hooks`): on 0.5.23
`managers/auxiliary_output.py` (device tensors that travel with a result: copied to pinned memory on the copy stream,
waited for with the result, consumed in launch order); on 0.5.17 copies in front of `GenerationBatchResult.copy_to_cpu`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.host_ring import HostRing
from sglang_probe.engine.capture.transfer import Transfer
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.platform.environment import accelerator_present
from sglang_probe.engine.releases import release
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import LedgerError, UnsupportedError
from sglang_probe.run.hook_points import (
    EMBED,
    RESID_POST,
    check_rows_of,
    check_sliding_window,
    check_tensor_parallel,
    parse_hook_point,
)

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

logger = logging.getLogger("sglang_probe")

_ROUND = 64
"""SGLang rounds captured sizes up to what ranks share evenly (`get_cuda_graph_max_batch_size`)."""


_RING_BYTES = 1 << 30
"""Pinned host memory for rows, which stay there until the writer thread has put them on disk: as many as may wait."""


class Accelerator(Instrument):
    """Rows and telemetry by way of graphs: taps in them, and the transfer of what they wrote."""

    name = "accelerator"
    features = ("accelerator rows",)
    in_model = True

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        in_graphs = config.simulated_graphs or accelerator_present()
        return in_graphs and (bool(config.hook_points) or config.telemetry is not None)

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return release.row_hooks()

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        return started.simulated_graphs == asked.simulated_graphs

    def attach(self, runner: Any) -> None:
        check_channel()
        runner.capture_tail_hooks.append(check_captured)


def check_model(runner: Any, config: EngineProbeConfig) -> None:
    """Refuse a device, a server or a model where rows and telemetry have not been proved.

    Raises:
        UnsupportedError: names what it is.
    """
    telemetry = config.telemetry is not None
    check_tensor_parallel(config.hook_points, guard.active().tp_size, telemetry=telemetry)
    check_device(runner.device)
    check_server(runner.server_args)
    name, longest = type(runner.model).__name__, runner.model_config.context_len
    check_rows_of(name, config.hook_points, release().residual_of, telemetry=telemetry)
    check_sliding_window(runner.model_config.hf_text_config.to_dict(), longest, name)


def check_device(device: str) -> None:
    """Refuse devices for which nothing was written. On CUDA a certificate is asked when the recording opens
    (`engine/hooks/certified.py`).

    Raises:
        UnsupportedError: names the device.
    """
    if device == "cpu":
        return
    if device != "cuda" or torch.version.hip is not None:
        raise UnsupportedError(
            f"capturing rows on `{'rocm' if device == 'cuda' else device}` is not supported",
            fix="remove `hook_points` and `telemetry` to record the ledger alone",
        )


def check_channel() -> None:
    """Refuse a release without the channel that rows travel on.

    Raises:
        UnsupportedError: names it.
    """
    if importlib.util.find_spec(release().row_channel) is None:
        raise UnsupportedError(
            f"this release of SGLang has no `{release().row_channel}`, on which rows leave an accelerator",
            fix="remove `hook_points` and `telemetry` to record the ledger alone",
        )


def check_server(server_args: Any) -> None:
    """Refuse what leaves the modules out that our taps are on.

    Raises:
        UnsupportedError: names the argument.
    """
    if getattr(server_args, "enable_nvidia_megakernel", False):
        raise UnsupportedError(
            "rows cannot be captured with `enable_nvidia_megakernel`: its decode steps run no module of the model",
            fix="leave it out, or remove `hook_points` to record the ledger alone",
        )


def graph_taps(
    runner: Any,
    hook_points: list[str],
    heads: dict[str, list[int]],
    parts: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
) -> GraphTaps:
    """Taps for the rows of a loaded model.

    Args:
        heads: kept heads and their width at hook points whose rows are per head.
        parts: their columns, where some heads only are kept.
        weights: of hook points whose rows are scores, the vectors of these, float32 `[d, k]`.
    """
    hidden = runner.model_config.hidden_size
    columns = {h: (_width(h, hidden, heads), runner.dtype) for h in hook_points if h not in weights}
    columns |= {h: (w.shape[1], torch.float32) for h, w in weights.items()}
    return make_taps(runner, {h: columns[h] for h in hook_points}, parts, weights, ring=_ring(runner))


def make_taps(
    runner: Any,
    columns: dict[str, tuple[int, torch.dtype]],
    parts: dict[str, torch.Tensor] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    ring: HostRing | None = None,
) -> GraphTaps:
    """Taps with room for the largest shape that will be captured.

    A larger forward is not replayed; the taps give it memory of its own.
    """
    taps = GraphTaps(
        columns,
        capacity=graph_rows(),
        device=runner.device,
        parts=parts,
        weights=weights,
        recording=recording_on(runner),
        ring=ring,
    )
    logger.info("sglang-probe: taps of %s rows, %.0f MB on %s", *taps.size, runner.device)
    return taps


def _ring(runner: Any) -> HostRing | None:
    """Host memory for the rows of the rank that records. Without it they take SGLang's own way, which allocates."""
    from sglang.srt.runtime_context import get_parallel

    if runner.device != "cuda" or get_parallel().tp_rank != 0 or _copies_elsewhere():
        return None
    try:
        return HostRing(_RING_BYTES)
    except RuntimeError as e:
        logger.warning("sglang-probe: no pinned memory of %s MB for rows: %s", _RING_BYTES >> 20, e)
        return None


def _copies_elsewhere() -> bool:
    """Whether SGLang copies to the host from a thread and a stream of its own too (`AsyncD2HCopyWorker`)."""
    try:
        from sglang.srt.utils.common import is_confidential_compute
    except ImportError:  # a release without it
        return False
    return bool(is_confidential_compute())


def has_graphs() -> bool:
    """Whether decode steps or prefills are replayed from graphs. `disable_cuda_graph` does not say: what is set for a
    phase goes before it (`arg_groups/cuda_graph_hook.py`)."""
    from sglang.srt.runtime_context import get_exec

    config = get_exec().graph.cuda_graph_config
    return any(phase.backend != "disabled" for phase in (config.decode, config.prefill))


def graph_rows() -> int:
    """Rows of the largest shape that will be captured, rounded up."""
    from sglang.srt.runtime_context import get_exec

    config = get_exec().graph.cuda_graph_config
    sizes = [bs for phase in (config.decode, config.prefill) if phase.backend != "disabled" for bs in phase.bs or ()]
    return -(-max(sizes, default=1) // _ROUND) * _ROUND


def recording_on(runner: Any) -> Callable[[], bool]:
    """Whether the running operations are being recorded into a graph."""
    return _recording if runner.device == "cuda" else lambda: False


def _width(hook_point: str, hidden: int, heads: dict[str, list[int]]) -> int:
    if parse_hook_point(hook_point).site in (EMBED, RESID_POST):
        return hidden
    count, head_dim = heads[hook_point]
    return count * head_dim


def _recording() -> bool:
    return torch.cuda.is_current_stream_capturing()


def check_captured(_graphs: Any, _out: Any, _forward_batch: Any, num_tokens: int) -> None:
    """In `ModelRunner.capture_tail_hooks`: the graph that was just recorded contains every tap."""
    session = guard.active()
    try:
        for instrument in session.instruments:
            instrument.check_captured(num_tokens)
    except Exception as e:
        session.fail("check_captured", e)


def check_recorded(taps: GraphTaps, num_tokens: int) -> None:
    """Every tap is in the graph that was just recorded. SGLang asks after the two forwards too that warm a shape up
    before it is captured; there telemetry copies no queries.

    Raises:
        LedgerError: names the hook point that is not.
    """
    if taps.warming_up:
        taps.disarm()
    else:
        taps.check_recorded(num_tokens)


def forward_batch_generation(original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `TpModelWorker.forward_batch_generation`: send the rows with the result of their forward."""
    result = original(worker, batch, *args, **kwargs)
    _send(result)
    return result


@guard.guarded
def _send(result: Any) -> None:
    plan = guard.active().plan
    if plan is None or not plan.travelling:
        return
    if result.delay_sample_func is None:
        attach(result, [*plan.travelling.values()])
    else:  # sampled after the previous result, for the sake of its grammar; sampling resets the channel
        result.delay_sample_func = _sample_then_attach(result, [*plan.travelling.values()])


def _sample_then_attach(result: Any, transfers: list[Transfer]) -> Callable[[], Any]:
    sample = result.delay_sample_func
    attach_guarded = guard.guarded(attach)

    def sample_then_attach() -> Any:
        sampled = sample()
        attach_guarded(result, transfers)
        return sampled

    return sample_then_attach


def attach(result: Any, transfers: list[Transfer]) -> None:
    """Add rows and telemetry to what SGLang copies to the host with a `GenerationBatchResult`, beside what others put
    there."""
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output

    logits = result.logits_output
    logits.auxiliary_device_output = append_auxiliary_output(logits.auxiliary_device_output, OnDevice(transfers))


class OnDevice:
    """SGLang's `DeviceAuxiliaryOutput`."""

    def __init__(self, transfers: list[Transfer]) -> None:
        self._transfers = transfers

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> OnHost:
        """Enqueue the copy on the stream that SGLang has made current, behind the forward."""
        _copy(self._transfers, copy_tensor)
        return OnHost(self._transfers)


class OnHost:
    """SGLang's `HostAuxiliaryOutput`."""

    def __init__(self, transfers: list[Transfer]) -> None:
        self._transfers = transfers

    def consume(self, _batch: Any, _commits: Any) -> None:
        """SGLang has waited for the copy, and has committed the tokens."""
        _arrived(self._transfers)


@guard.guarded
def _copy(transfers: list[Transfer], copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for transfer in transfers:
        transfer.send(copy_tensor)


@guard.guarded
def _arrived(transfers: list[Transfer]) -> None:
    for transfer in transfers:
        transfer.arrive()


@guard.guarded
def travelling() -> list[Transfer]:
    """Transfers of the forward that was just enqueued."""
    plan = guard.active().plan
    return [] if plan is None else [*plan.travelling.values()]


def send(transfers: list[Transfer], copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Enqueue the copies on the current stream; an event after them, or True where there are no streams."""
    _copy(transfers, copy_tensor)
    if not torch.cuda.is_available():
        return True
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


@guard.guarded
def arrived(transfers: list[Transfer], event: Any) -> None:
    """The result of a forward was processed, and its copies waited for.

    Raises:
        LedgerError: they were not.
    """
    if event is None or (event is not True and not event.query()):
        raise LedgerError("the rows of a forward were still on their way when its result was processed")
    _arrived(transfers)
