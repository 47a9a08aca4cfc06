"""Updates of the weights of a running engine (RL loops, `/update_weights_from_disk`, checkpoint engines).

Rows before and after one are of different models, and so are cached entries that were not flushed. So updates are
counted, every forward pass is recorded with the count (`schema.FORWARDS`), and a live server begins another segment.

SGLang: `managers/scheduler_components/weight_updater.py`. An update that fails counts too, because part of the weights
may have been replaced; so does the end of a session in which weights are written from outside (RDMA), memory that comes
back without what it held, and a new name for the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_probe.engine.hooks import guard
from sglang_probe.engine.releases import release
from sglang_probe.engine.releases.base import Hook

logger = logging.getLogger("sglang_probe")

UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
TAGS = ("weights",)


def update_from_disk(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `update_weights_from_disk`."""
    _changed("disk", request)


def update_from_distributed(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `update_weights_from_distributed`."""
    _changed("distributed", request)


def update_from_tensor(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `update_weights_from_tensor`."""
    _changed("tensor", request)


def update_from_ipc(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `update_weights_from_ipc`."""
    _changed("ipc", request)


def begin_session(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `begin_weight_update`: packed weights are unpacked, and may be written from outside."""
    _changed("session begins", request)


def end_session(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `end_weight_update`: what was written from outside since `begin_weight_update` is in force."""
    _changed("session ends", request)


def resume_memory(_result: Any, _updater: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `resume_memory_occupation`: memory of the weights comes back without what it held."""
    if not request.tags or set(TAGS) & set(request.tags):
        _changed("memory released", request)


def renamed(_result: Any, _scheduler: Any, request: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `Scheduler.handle_update_weight_version`."""
    _changed("renamed", request)


def hooks(methods: dict[str, Callable[..., None]]) -> list[Hook]:
    """Hooks on methods of SGLang's updater."""
    return [(f"{UPDATER}.{name}", hook, "AFTER") for name, hook in methods.items()]


def _changed(how: str, request: Any) -> None:
    session = guard.session
    if session is None:
        return
    try:
        version = release().weight_version_after(request)
        path = getattr(request, "model_path", None)
        session.weights_changed(how, None if version is None else str(version), None if path is None else str(path))
    except Exception as e:
        session.fail("weights", e)  # whatever follows is of weights that nobody could name
