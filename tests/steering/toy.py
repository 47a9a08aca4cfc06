"""A library of toy vectors, as `steering/spec.py` reads one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_probe.steer_ask import Steer
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import Spec


@dataclass(frozen=True)
class Card:
    kind: str = "direction"
    hook_point: str = "blocks.1.hook_resid_post"
    layer_mean_norm: float | None = None
    percentile99: float | None = None
    norm: float = 1.0


@dataclass(frozen=True)
class Vector:
    card: Card
    hash: str
    threshold: float | None = None


LIBRARY = {
    "up": Vector(Card(layer_mean_norm=10.0), "a" * 64),
    "up again": Vector(Card(layer_mean_norm=10.0), "a" * 64),
    "late": Vector(Card(hook_point="blocks.2.hook_resid_post"), "b" * 64),
    "f7": Vector(Card(kind="feature", percentile99=3.0, norm=2.0), "c" * 64),
    "dictionary": Vector(Card(kind="sae"), "1" * 64),
    "fires": Vector(Card(kind="probe", hook_point="blocks.2.hook_resid_post"), "e" * 64, 0.25),
    "other": Vector(Card(kind="probe"), "f" * 64, -1.0),
    "bare": Vector(Card(kind="probe"), "0" * 64),
    "embed": Vector(Card(hook_point="hook_embed"), "d" * 64),
}
NUMBERS = {v.hash: i + 1 for i, v in enumerate([LIBRARY["up"], LIBRARY["late"], LIBRARY["f7"]])}


def spec(*entries: dict[str, Any]) -> Spec:
    found = spec_of(
        [Steer.model_validate({"vector": "up", "strength": 2, **e}) for e in entries], LIBRARY, where="steer"
    )
    assert found is not None
    return found
