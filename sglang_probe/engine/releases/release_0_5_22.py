"""SGLang 0.5.22: 0.5.23 without the place where every request is made (`Scheduler._create_generation_req`)."""

from __future__ import annotations

from sglang_probe.engine.releases import release_0_5_23
from sglang_probe.engine.releases.base import Hook
from sglang_probe.engine.releases.release_0_5_17 import init_req_max_new_tokens


class Adapter(release_0_5_23.Adapter):
    """See `Release`."""

    version = "0.5.22"
    not_shown = frozenset(("traces",))

    def request_hooks(self) -> list[Hook]:
        scheduler = "sglang.srt.managers.scheduler.Scheduler"
        return [(f"{scheduler}.init_req_max_new_tokens", init_req_max_new_tokens, "AFTER")]
