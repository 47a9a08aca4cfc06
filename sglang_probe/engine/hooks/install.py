"""Reads the config, checks the inventory, registers the hooks that the config needs, and proves that they took."""

from __future__ import annotations

import multiprocessing
import pkgutil
import signal
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from sglang_probe.config import load_config
from sglang_probe.engine.hooks import instruments
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.releases import Hook, release
from sglang_probe.errors import InventoryError

_SCHEDULER = "sglang.srt.managers.scheduler"
_HTTP = "sglang.srt.entrypoints.http_server"
_WORKERS = ("sglang.srt.managers.detokenizer_manager", "sglang.srt.managers.data_parallel_controller")
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


def install(path: str) -> None:
    """Install the hooks in this process.

    Every process checks config and inventory. Hooks are registered only where the scheduler is loaded: in its own
    process, and harmlessly in the one that starts it; the detokenizer is spared the imports.

    Raises:
        ConfigError: the YAML is wrong. InventoryError: the installed SGLang is not as reviewed.
    """
    config = load_config(Path(path), EngineProbeConfig)
    instruments.require(config)
    if config.ignore_interrupt and multiprocessing.parent_process() is not None:
        # A terminal, a process manager and `kill` of a group send these to all processes at once.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    if config.live is not None and _serves_http(sys.modules):
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sglang_probe.engine.hooks import http

        HookRegistry.register(http.TARGET, http.add_routes, HookType.BEFORE)
    if _SCHEDULER not in sys.modules:
        return

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_probe.engine.hooks import guard
    from sglang_probe.engine.hooks.session import Session

    guard.session = Session(config)
    for target, hook, kind in all_hooks(config):
        HookRegistry.register(target, hook, HookType[kind])
    # SGLang only logs a target that it cannot patch. Checked when the scheduler is built, after all plugins applied.
    HookRegistry.register(f"{_SCHEDULER}.Scheduler.__init__", _verify_then_open(config), HookType.AFTER)


def all_hooks(config: EngineProbeConfig) -> list[Hook]:
    """(target, hook, kind) of everything this config needs; must agree with the inventory."""
    from sglang_probe.engine.hooks import model, scheduler

    sglang = release()
    in_model: list[Hook] = [
        (f"{_RUNNER}.load_model", model.load_model, "AFTER"),
        (f"{_RUNNER}.forward", model.forward, "AROUND"),
    ]
    return [
        (f"{_SCHEDULER}.Scheduler.run_event_loop", scheduler.run_event_loop, "AROUND"),
        (f"{_SCHEDULER}.Scheduler.run_batch", scheduler.run_batch, "AROUND"),
        (f"{_SCHEDULER}.Scheduler.process_batch_result", scheduler.process_batch_result, "AROUND"),
        *sglang.request_hooks(),
        *sglang.refusal_hooks(),
        *sglang.abort_hooks(),
        *sglang.weight_hooks(),
        *sglang.publication_hooks(),
        *sglang.control_hooks(),
        *(in_model if any(kind.in_model for kind in instruments.wanted(config)) else []),
        *instruments.hooks(config, sglang),
    ]


def _serves_http(loaded: Container[str]) -> bool:
    """Whether this process will serve HTTP, told from the SGLang modules loaded so far.

    `launch_server` and `sglang serve` load plugins before anything else, an embedding script after everything else;
    schedulers, the detokenizer and the data parallel controller have been loaded to be run.
    """
    if _HTTP in loaded:
        return True
    return not any(name in loaded for name in (_SCHEDULER, *_WORKERS))


def _verify_then_open(config: EngineProbeConfig) -> Callable[..., None]:
    from sglang_probe.engine.hooks import scheduler as scheduling

    def hook(result: None, scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
        for target, patch, _kind in all_hooks(config):
            if not _is_patched(target, patch):
                raise InventoryError(f"SGLang did not apply the hook on {target}", fix="see its log for the reason")
        scheduling.scheduler_init(result, scheduler, server_args, *args, **kwargs)

    return hook


def _is_patched(target: str, hook: Callable[..., Any]) -> bool:
    """Whether `hook` is somewhere in the chain of wrappers around a target; SGLang's own decorators wrap some too."""
    function: Any = pkgutil.resolve_name(target)
    while function is not None:
        if any(cell.cell_contents is hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
