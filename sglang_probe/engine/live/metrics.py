"""Prometheus series of a live recording, on the `/metrics` that SGLang serves.

SGLang collects series of several processes through files in `PROMETHEUS_MULTIPROC_DIR`, which it sets before it starts
the scheduler; whatever is counted there appears. The keeper publishes once a second, never the scheduler thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.live.stops import REASONS, Stops
from sglang_probe.engine.live.totals import Totals
from sglang_probe.run import schema

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

_MONITORED = {
    "monitored rows": "rows",
    "shed rows": "shed",
    "not finite rows": "not_finite",
    "monitored requests": "requests",
    "monitor alarms": "alarms",
}
"""Counters of a monitor, and the fields of its status."""


class Metrics:
    """Counters and gauges; construct it in the scheduler process only, after SGLang set up its metrics.

    Args:
        model: as the server names it.
        dp_rank: data-parallel rank, a label like SGLang's own where there are several.
    """

    def __init__(self, model: str, dp_rank: int | None = None) -> None:
        from prometheus_client import Counter
        from prometheus_client import Gauge as Made

        self._gauge, self._counter = Made, Counter
        labels = {"model_name": model} | ({} if dp_rank is None else {"dp_rank": str(dp_rank)})

        def counter(name: str, what: str) -> Counter:
            return Counter(f"sglang_probe:{name}", what, list(labels)).labels(**labels)

        def gauge(name: str, what: str) -> Gauge:
            return Made(f"sglang_probe:{name}", what, list(labels), multiprocess_mode="mostrecent").labels(**labels)

        self._counters = {
            "computed": counter("computed_tokens", "Positions that a forward pass computed: prompts and decode steps."),
            "reused": counter("reused_tokens", "Positions whose entries came from the prefix cache."),
            "recomputed": counter("recomputed_tokens", "Computed positions that a retraction had thrown away."),
            "evicted": counter("evicted_tokens", "Positions that the prefix cache gave up for others."),
            "dropped": counter("dropped_tokens", "Positions whose facts were lost because the disk was too slow."),
            "errors": counter("write_errors", "Failures to write the recording, those that stopped it among them."),
        }
        stopped = Counter(
            "sglang_probe:recording_stops", "Times that the recording stopped, by reason.", [*labels, "reason"]
        )
        self._counters |= {f"stop: {reason}": stopped.labels(**labels, reason=reason) for reason in REASONS}
        self._recording = gauge("recording", "1 while requests are being recorded, 0 while they are not.")
        self._depth = gauge("writer_queue_depth", "Commits that wait to be written.")
        self._published: dict[str, int] = dict.fromkeys(self._counters, 0)
        self._make = (counter, gauge, labels)
        self._monitor: dict[str, Gauge] | None = None
        self._detectors: Gauge | None = None
        self._causes: Counter | None = None

    def _monitored(self, status: Mapping[str, Any]) -> dict[str, int]:
        """Bring the series of a monitor up to date, and make them first: a server without one has none."""
        counter, gauge, labels = self._make
        if self._monitor is None:
            self._counters |= {
                "monitored rows": counter("monitored_rows", "Decode rows that the monitor read."),
                "shed rows": counter(
                    "monitor_shed_rows", "Decode rows that the monitor left out, as the disk was behind."
                ),
                "not finite rows": counter("monitor_not_finite_rows", "Rows with a number that is not finite."),
                "monitored requests": counter("monitored_requests", "Requests that the monitor judged."),
                "monitor alarms": counter("monitor_alarms", "Requests that the monitor found unusual."),
            }
            self._published |= dict.fromkeys(_MONITORED, 0)
            self._monitor = {
                "on": gauge("monitor_on", "1 while the monitor reads, 0 once it stopped."),
                "drift": gauge("monitor_drift", "Statistics whose detector of drift has alarmed."),
            }
            if status["judging"]:
                self._detectors = self._gauge(
                    "sglang_probe:monitor_detector",
                    "Highest evidence of drift, as a share of what alarms.",
                    [*labels, "statistic"],
                    multiprocess_mode="mostrecent",
                )
        self._monitor["on"].set(status["off"] is None)
        self._monitor["drift"].set(len(status.get("drift", ())))
        for name, level in status.get("highest", {}).items():
            if self._detectors is not None:
                self._detectors.labels(**labels, statistic=name).set(level)
        return {name: int(status.get(of, 0)) for name, of in _MONITORED.items()}

    def _by_cause(self, causes: Mapping[str, int]) -> dict[str, int]:
        """The same of causes: a series for each that has occurred."""
        _, _, labels = self._make
        if self._causes is None:
            what = "Prompt tokens that were computed, by cause, of closed segments."
            self._causes = self._counter("sglang_probe:prompt_tokens_by_cause", what, [*labels, "cause"])
        for cause in causes:
            name = f"cause: {cause}"
            if name not in self._counters:
                self._counters[name] = self._causes.labels(**labels, cause=cause)
                self._published[name] = 0
        return {f"cause: {cause}": n for cause, n in causes.items()}

    def publish(
        self,
        totals: Totals,
        *,
        waiting: int,
        write_errors: int,
        stops: Stops,
        monitor: Mapping[str, Any] | None = None,
        causes: Mapping[str, int] | None = None,
    ) -> None:
        """Bring the series up to date.

        Args:
            monitor: `LiveMonitor.status`.
            causes: computed prompt tokens of closed segments, by cause (`Causes.tokens`).
        """
        self._recording.set(stops.fault is None)
        p = totals.positions
        values = {
            "computed": p["computed"] + p[schema.DECODE] + p[schema.OVERSHOOT] + p[schema.RECOMPUTE],
            "reused": p["reused"],
            "recomputed": p[schema.RECOMPUTE],
            "evicted": totals.evicted,
            "dropped": p[schema.DROPPED],
            "errors": write_errors,
            **{f"stop: {reason}": n for reason, n in stops.counts.items()},
            **({} if monitor is None else self._monitored(monitor)),
            **({} if causes is None else self._by_cause(causes)),
        }
        for name, value in values.items():
            if value > self._published[name]:
                self._counters[name].inc(value - self._published[name])
                self._published[name] = value
        self._depth.set(waiting)
