"""Prometheus series of a live recording, on the `/metrics` that SGLang serves.

SGLang collects series of several processes through files in `PROMETHEUS_MULTIPROC_DIR`, which it sets before it starts
the scheduler; whatever is counted there appears. The keeper publishes once a second, never the scheduler thread.
"""

from __future__ import annotations

from sglang_probe.engine.live.stops import REASONS, Stops
from sglang_probe.engine.live.totals import Totals
from sglang_probe.run import schema


class Metrics:
    """Counters and gauges; construct it in the scheduler process only, after SGLang set up its metrics.

    Args:
        model: as the server names it.
        dp_rank: data-parallel rank, a label like SGLang's own where there are several.
    """

    def __init__(self, model: str, dp_rank: int | None = None) -> None:
        from prometheus_client import Counter, Gauge

        labels = {"model_name": model} | ({} if dp_rank is None else {"dp_rank": str(dp_rank)})

        def counter(name: str, what: str) -> Counter:
            return Counter(f"sglang_probe:{name}", what, list(labels)).labels(**labels)

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"sglang_probe:{name}", what, list(labels), multiprocess_mode="mostrecent").labels(**labels)

        self._counters = {
            "computed": counter("computed_tokens", "Positions that a forward pass computed: prompts and decode steps."),
            "reused": counter("reused_tokens", "Positions whose entries came from the prefix cache."),
            "recomputed": counter("recomputed_tokens", "Computed positions that a retraction had thrown away."),
            "dropped": counter("dropped_tokens", "Positions whose facts were lost because the disk was too slow."),
            "errors": counter("write_errors", "Failures to write the recording, those that stopped it among them."),
        }
        stopped = Counter(
            "sglang_probe:recording_stops", "Times that the recording stopped, by reason.", [*labels, "reason"]
        )
        self._counters |= {f"stop: {reason}": stopped.labels(**labels, reason=reason) for reason in REASONS}
        self._recording = gauge("recording", "1 while requests are being recorded, 0 while they are not.")
        self._depth = gauge("writer_queue_depth", "Commits that wait to be written.")
        self._published = dict.fromkeys(self._counters, 0)

    def publish(self, totals: Totals, *, waiting: int, write_errors: int, stops: Stops) -> None:
        """Bring the series up to date."""
        self._recording.set(stops.fault is None)
        p = totals.positions
        values = {
            "computed": p["computed"] + p[schema.DECODE] + p[schema.OVERSHOOT] + p[schema.RECOMPUTE],
            "reused": p["reused"],
            "recomputed": p[schema.RECOMPUTE],
            "dropped": p[schema.DROPPED],
            "errors": write_errors,
            **{f"stop: {reason}": n for reason, n in stops.counts.items()},
        }
        for name, value in values.items():
            if value > self._published[name]:
                self._counters[name].inc(value - self._published[name])
                self._published[name] = value
        self._depth.set(waiting)
