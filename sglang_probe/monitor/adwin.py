"""ADWIN (Bifet and Gavaldà 2007), of the package `river`: another detector of drift, for comparison."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_probe.errors import UnsupportedError


def adwin_alarms(values: Iterable[float], delta: float = 0.002) -> list[int]:
    """Numbers, from 0, of the values at which ADWIN sees a change of their mean.

    Args:
        delta: its confidence parameter. It is no rate of false alarms of a stream.

    Raises:
        UnsupportedError: `river` is not installed.
    """
    try:
        from river.drift import ADWIN
    except ImportError as e:
        raise UnsupportedError("ADWIN needs the package `river`", fix="pip install 'sglang-probe[monitor]'") from e
    detector, found = ADWIN(delta=delta), []
    for i, value in enumerate(values):
        detector.update(float(value))
        if detector.drift_detected:
            found.append(i)
    return found
