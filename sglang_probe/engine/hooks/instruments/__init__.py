"""The instruments, and the questions that are asked of all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, TypeVar

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.instruments.accelerator import Accelerator
from sglang_probe.engine.hooks.instruments.answers import RowsInResponse
from sglang_probe.engine.hooks.instruments.base import Forward, Instrument
from sglang_probe.engine.hooks.instruments.cache import CacheUse
from sglang_probe.engine.hooks.instruments.forced import ForcedOutputs
from sglang_probe.engine.hooks.instruments.graph_check import GraphCheck
from sglang_probe.engine.hooks.instruments.kept_sets import KeptSets
from sglang_probe.engine.hooks.instruments.labels import Labels
from sglang_probe.engine.hooks.instruments.live import LiveServer
from sglang_probe.engine.hooks.instruments.monitor import Watching
from sglang_probe.engine.hooks.instruments.positions import Positions
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.instruments.slot_truth import SlotTruth
from sglang_probe.engine.hooks.instruments.steer import Steering
from sglang_probe.engine.hooks.instruments.telemetry import AttentionTelemetry
from sglang_probe.engine.hooks.instruments.traces import Traces
from sglang_probe.engine.releases import release
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import InventoryError

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.hooks.inventory import Inventory

__all__ = [
    "INSTRUMENTS",
    "ONE_RANK",
    "Forward",
    "Instrument",
    "features",
    "honoured",
    "hooks",
    "require",
    "serves",
    "wanted",
]

INSTRUMENTS: tuple[type[Instrument], ...] = (
    LiveServer,
    Accelerator,
    Steering,  # before the taps: captured rows are those after an intervention
    Watching,
    Rows,
    RowsInResponse,
    GraphCheck,
    AttentionTelemetry,
    ForcedOutputs,
    CacheUse,
    Labels,
    Positions,
    KeptSets,
    SlotTruth,
    Traces,
)
"""In the order in which they are asked."""

ONE_RANK = frozenset(kind.field for kind in INSTRUMENTS if kind.one_rank and kind.field is not None)
"""Fields of `Ask` that one rank alone would act on: refused under tensor parallelism."""

T = TypeVar("T", bound=Hashable)

_ALWAYS = ("accounting", "control")
"""Features of the inventory that every recording needs."""


def wanted(config: EngineProbeConfig) -> list[type[Instrument]]:
    """The instruments of a configuration."""
    return [kind for kind in INSTRUMENTS if kind.wanted(config)]


def features(config: EngineProbeConfig) -> list[str]:
    """Features of the inventory that a configuration needs."""
    return _once([*_ALWAYS, *(f for kind in wanted(config) for f in kind.needs(config))])


def require(config: EngineProbeConfig, *further: str) -> Inventory:
    """Refuse unless the installed SGLang is as reviewed, and what was shown, for all that a configuration needs.

    Args:
        further: features of the inventory that are needed besides.

    Raises:
        InventoryError: names what is not.
    """
    needed = [*features(config), *further]
    found = inventory.require(needed)
    adapter = release()
    points = adapter.shown_points
    unshown = [f for f in needed if f in adapter.not_shown]
    if points is not None:
        unshown += [f"rows of `{name}`" for name in config.hook_points if name not in points]
        unshown += ["a monitor of rows"] if config.monitor is not None else []
    if unshown:
        raise InventoryError(
            f"{', '.join(unshown)}: not shown to be right in an engine of SGLang {adapter.version}",
            fix="use a release of which `docs/evidence/releases.md` says it was, or leave it out"
            + (f" (hook points: {', '.join(sorted(points))} or none)" if points else ""),
        )
    return found


def honoured(config: EngineProbeConfig) -> frozenset[str]:
    """Fields of `Ask` that requests may use under a configuration."""
    return frozenset(field for kind in wanted(config) if (field := kind.honours(config)) is not None)


def hooks(config: EngineProbeConfig, release: Release) -> list[Hook]:
    """What the instruments of a configuration patch in SGLang, each hook once."""
    return _once(hook for kind in wanted(config) for hook in kind.hooks(release))


def serves(started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
    """Whether an engine that was started for one recording can make another."""
    return all(kind.serves(started, asked) for kind in INSTRUMENTS)


def _once(given: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(given))
