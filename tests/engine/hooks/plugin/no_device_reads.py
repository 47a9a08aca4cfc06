"""A second SGLang plugin, for tests: inside the probe's observations, every tensor raises when the host reads it.

On a GPU such a read waits for the device, and the scheduler with it. On a CPU nothing would be seen, so that each
observation runs under modes that raise: one for what PyTorch's Python layer does with a tensor (`tolist` of a CPU
tensor reaches no operator), one for operators whose result depends on values. Loaded through `PYTHONPATH`;
`NO_DEVICE_READS` is where it reports how many observations it watched, and of which functions.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = {
    "tolist",
    "item",
    "numpy",
    "cpu",
    "nonzero",
    "is_nonzero",
    "equal",
    "allclose",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "__contains__",
}
OPERATORS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"}

INDEXING = {"index", "index_put", "index_put_"}


class HostRead(AssertionError):
    """A tensor of the engine was read from the host."""


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        ours = bool(args) and getattr(args[0], "from_host", False)
        if name in METHODS and not ours:
            raise HostRead(f"{name}() of a tensor of the engine")
        if name == "to" and not ours and any(_is_cpu(a) for a in (*args[1:], *kwargs.values())):
            raise HostRead("to('cpu') of a tensor of the engine")
        out = func(*args, **kwargs)
        if (func is torch.tensor or ours) and isinstance(out, torch.Tensor):  # made of host values, or part of such
            out.from_host = True
        return out


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.overloadpacket.__name__ in OPERATORS:
            raise HostRead(f"operator {op} on a tensor of the engine")
        if op.overloadpacket.__name__ in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise HostRead(f"operator {op} with a mask")  # as many rows as the mask has ones
        return op(*args, **(kwargs or {}))


def _is_cpu(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "cpu") or x == "cpu"


watched: Counter[str] = Counter()


def without_reads(observe: Callable[..., Any]) -> Callable[..., Any]:
    """`observe`, with every tensor unreadable meanwhile."""

    @functools.wraps(observe)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        watched[observe.__qualname__] += 1
        with _Methods(), _Operators():
            return observe(*args, **kwargs)

    return wrapper


ALLOWED = {"_close"}
"""Observations that end a recording; they may wait."""


def register() -> None:
    if "NO_DEVICE_READS" not in os.environ or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang_probe.engine.hooks import guard, session

    for name in ("guarded", "tapping"):  # for what is decorated from now on
        setattr(guard, name, functools.partial(_watch, getattr(guard, name)))
    for module in [m for n, m in sys.modules.items() if n.startswith("sglang_probe.engine.hooks")]:
        for function in vars(module).values():  # for what has been
            if getattr(getattr(function, "__wrapped__", None), "__module__", None) == module.__name__:
                _watch_decorated(function)
    _what_was_sent_may_be_read()
    if "SIMULATED_REPLAY" in os.environ:
        simulate_replay()
    report = Path(os.environ["NO_DEVICE_READS"])
    close = session.Session.close

    def close_and_report(running: Any) -> None:
        close(running)
        report.write_text(json.dumps(watched))

    session.Session.close = close_and_report  # type: ignore[method-assign]


def _what_was_sent_may_be_read() -> None:
    """On a GPU it is another tensor then, in host memory; on a CPU 0.5.17's asynchronous copy is a `to("cpu")`."""
    from sglang_probe.engine.capture.transfer import Transfer

    send = Transfer.send

    def send_and_mark(transfer: Any, copy: Any) -> None:
        transfer._on_device.from_host = True
        send(transfer, copy)
        transfer._on_host.from_host = True

    Transfer.send = send_and_mark  # type: ignore[method-assign]


def simulate_replay() -> None:
    """Make decode steps look as if they had been replayed: SGLang says so, the host does not know which taps fired, and
    the rows after the real batch hold something."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_probe.engine.capture.graph_taps import GraphTaps
    from sglang_probe.engine.hooks import guard

    def replayed(output: Any, _runner: Any, forward_batch: Any, *_: Any, **__: Any) -> Any:
        running = guard.session
        if running is not None and running.instruments and forward_batch.forward_mode.is_decode():
            output.can_run_graph = True
            of = [x for i in running.instruments for x in (i, getattr(i, "measurements", None))]
            for taps in (getattr(x, "taps", None) for x in of):
                if isinstance(taps, GraphTaps):
                    taps._written = dict.fromkeys(taps.columns, -1)
                    taps.buffer[forward_batch.batch_size :].fill_(7)
        return output

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner._forward_raw", replayed, HookType.AFTER)


def _watch(guard: Callable[..., Any], observe: Callable[..., Any]) -> Callable[..., Any]:
    return guard(observe if observe.__name__ in ALLOWED else without_reads(observe))  # type: ignore[no-any-return]


def _watch_decorated(function: Any) -> None:
    """Put the watched observation into a guard's closure."""
    if function.__wrapped__.__name__ in ALLOWED:
        return
    for cell in getattr(function, "__closure__", None) or ():
        if cell.cell_contents is function.__wrapped__:
            cell.cell_contents = without_reads(function.__wrapped__)
