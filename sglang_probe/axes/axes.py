"""All axes by name: `make_axis`."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

from sglang_probe.axes.axis import Axis, Sources
from sglang_probe.axes.frequency import Frequency
from sglang_probe.axes.function import Function
from sglang_probe.axes.lexical import Lexical
from sglang_probe.axes.pattern import Pattern
from sglang_probe.axes.phase import Phase
from sglang_probe.axes.position import Depth, Position
from sglang_probe.axes.repeat import Repeat
from sglang_probe.axes.role import Role
from sglang_probe.axes.segment import Labelled, Segment
from sglang_probe.errors import ConfigError

AXES: dict[str, tuple[type[Axis], Callable[[Sources], Axis]]] = {
    "segment": (Segment, lambda s: Segment(s.segments)),
    "role": (Role, lambda s: Role(s.tokenizer)),
    "lexical": (Lexical, lambda s: Lexical(s.vocabulary)),
    "frequency": (Frequency, lambda _: Frequency()),
    "repeat": (Repeat, lambda _: Repeat()),
    "position": (Position, lambda _: Position()),
    "phase": (Phase, lambda _: Phase()),
    "depth": (Depth, lambda _: Depth()),
}
_PATTERN = re.compile(r"([A-Za-z][\w-]*)=~(.+)", re.DOTALL)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def make_axis(spec: str, sources: Sources) -> Axis:
    """An axis by its name in `AXES`, or one of the user's own.

    Args:
        spec: a built-in name; a name under which the workload labelled character spans; `NAME=~REGEX`; or
            `module:function`.

    Raises:
        ConfigError: no such axis, or it lacks what it needs.
    """
    if spec in sources.labels:
        return Labelled(spec, sources.labels[spec])
    if spec in AXES:
        return AXES[spec][1](sources)
    if match := _PATTERN.fullmatch(spec):
        return Pattern(match[1], match[2], sources.vocabulary)
    if _FUNCTION.fullmatch(spec):
        return Function(spec)
    known = [*AXES, *sources.labels]
    near = get_close_matches(spec, known, n=1)
    raise ConfigError(
        f"unknown axis `{spec}`" + (f"; did you mean `{near[0]}`?" if near else ""),
        fix=f"one of {', '.join(known)}, `NAME=~REGEX`, or `module:function`",
    )


def needs_ids(spec: str, sources: Sources) -> bool:
    """Whether an axis reads token ids, known before anything that it is made from is read."""
    if spec in sources.labels:
        return False
    if spec in AXES:
        return AXES[spec][0].needs_ids
    return make_axis(spec, sources).needs_ids if _FUNCTION.fullmatch(spec) else bool(_PATTERN.fullmatch(spec))
