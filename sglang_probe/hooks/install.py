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
from sglang_probe.errors import InventoryError
from sglang_probe.hooks import inventory
from sglang_probe.hooks.config import EngineProbeConfig
from sglang_probe.releases import Hook, release

_SCHEDULER = "sglang.srt.managers.scheduler"
_HTTP = "sglang.srt.entrypoints.http_server"
_WORKERS = ("sglang.srt.managers.detokenizer_manager", "sglang.srt.managers.data_parallel_controller")
_BATCH = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


def install(path: str) -> None:
    """Install the hooks in this process.

    Every process checks config and inventory. Hooks are registered only where the scheduler is loaded: in its own
    process, and harmlessly in the one that starts it; the detokenizer is spared the imports.

    Raises:
        ConfigError: the YAML is wrong. InventoryError: the installed SGLang is not as reviewed.
    """
    config = load_config(Path(path), EngineProbeConfig)
    inventory.require(config.features)
    if config.ignore_interrupt and multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if config.live is not None and _serves_http(sys.modules):
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sglang_probe.hooks import http

        HookRegistry.register(http.TARGET, http.add_routes, HookType.BEFORE)
    if _SCHEDULER not in sys.modules:
        return

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_probe.hooks import session as probe

    probe.session = probe.Session(config)
    for target, hook, kind in _hooks(config):
        HookRegistry.register(target, hook, HookType[kind])
    # SGLang only logs a target that it cannot patch. Checked when the scheduler is built, after all plugins applied.
    HookRegistry.register(f"{_SCHEDULER}.Scheduler.__init__", _verify_then_open(config), HookType.AFTER)


def _hooks(config: EngineProbeConfig) -> list[Hook]:
    """(target, hook, kind) of everything this config needs; must agree with the inventory."""
    from sglang_probe.hooks import accounting

    sglang = release()
    hooks: list[Hook] = [
        (f"{_SCHEDULER}.Scheduler.run_batch", accounting.run_batch, "AROUND"),
        (f"{_SCHEDULER}.Scheduler.process_batch_result", accounting.process_batch_result, "AROUND"),
        *sglang.abort_hooks(),
        *sglang.publication_hooks(),
        *sglang.control_hooks(),
    ]
    if config.hook_points or config.telemetry is not None:
        from sglang_probe.hooks import rows

        hooks += [
            (f"{_RUNNER}.load_model", rows.load_model, "AFTER"),
            (f"{_RUNNER}.forward", rows.forward, "AROUND"),
        ]
    if "accelerator rows" in config.features:
        hooks += sglang.row_hooks()
    if config.forced_outputs:
        from sglang_probe.hooks import forced

        hooks.append((f"{_RUNNER}.sample", forced.sample, "AFTER"))
    if config.bypass or config.positions or config.evictions:
        hooks += sglang.bypass_hooks()
    if config.positions:
        from sglang_probe.hooks import positions

        hooks += [(f"{_BATCH}.init_new", positions.init_new, "AFTER"), *sglang.position_hooks()]
    if config.live is not None:
        from sglang_probe.hooks import live

        hooks += [*sglang.live_hooks(), (f"{_SCHEDULER}.Scheduler.run_event_loop", live.run_event_loop, "AROUND")]
    return hooks


def _serves_http(loaded: Container[str]) -> bool:
    """Whether this process will serve HTTP, told from the SGLang modules loaded so far.

    `launch_server` and `sglang serve` load plugins before anything else, an embedding script behind everything else;
    schedulers, the detokenizer and the data parallel controller have been loaded to be run.
    """
    if _HTTP in loaded:
        return True
    return not any(name in loaded for name in (_SCHEDULER, *_WORKERS))


def _verify_then_open(config: EngineProbeConfig) -> Callable[..., None]:
    from sglang_probe.hooks import accounting

    def hook(result: None, scheduler: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
        for target, patch, _kind in _hooks(config):
            if not _is_patched(target, patch):
                raise InventoryError(f"SGLang did not apply the hook on {target}", fix="see its log for the reason")
        accounting.scheduler_init(result, scheduler, server_args, *args, **kwargs)

    return hook


def _is_patched(target: str, hook: Callable[..., Any]) -> bool:
    """Whether `hook` is somewhere in the chain of wrappers around a target; SGLang's own decorators wrap some too."""
    function: Any = pkgutil.resolve_name(target)
    while function is not None:
        if any(cell.cell_contents is hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
