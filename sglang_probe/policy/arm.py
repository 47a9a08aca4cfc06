"""An arm: a named policy, as server arguments, run-time switches and instructions to each request."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from sglang_probe.config import Config
from sglang_probe.policy.partners import Partners
from sglang_probe.policy.switches import SWITCHABLE, CacheUse, Switches
from sglang_probe.steer_ask import MOST, Steer


class Arm(Config):
    """One side of a comparison.

    `cache` says how the arm uses SGLang's radix cache:

    * `on`: as SGLang does.
    * `off`: nothing is matched and nothing is published, so that no later request can be rebound to it.
      (SGLang's own `SGLANG_RADIX_FORCE_MISS` does not do that.)
    * `read_only`: requests reuse what is there and publish nothing: the cache stays as it was.
    * `write_only`: requests reuse nothing at admission and publish. After a chunk or at the end of a prompt SGLang may
      still repoint them to entries that others published; the ledger has these as rebinds.
    """

    cache: CacheUse = "on"
    """`on`: as SGLang does. `off`: nothing is reused or published. `read_only`: nothing is published. `write_only`:
    nothing is reused when a request is admitted."""
    partners: Partners | None = None
    """Serve in groups of fixed or random composition, instead of keeping `concurrency` requests in flight."""
    dtype: str | None = None
    """`bfloat16`, `float16`, `float32`; by default that of the experiment."""
    steer: tuple[Steer, ...] | None = Field(default=None, max_length=MOST)
    """Interventions on every request of this arm, after its own ones, by vectors of the experiment's `steer: library`.
    """
    server: dict[str, Any] = Field(default_factory=dict)
    """SGLang server arguments, over those of the experiment. Those that SGLang can change while it runs are changed
    while it runs (`sglang_probe.policy.switches`); others need an engine of their own."""

    @field_validator("cache", mode="before")
    @classmethod
    def _yaml_reads_on_and_off_as_booleans(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    def start_args(self, server: dict[str, Any]) -> dict[str, Any]:
        """Server arguments with which this arm's engine must have been started.

        Args:
            server: arguments of the experiment. What it says of switchable ones holds at the start, so that arms which
                differ in these only share an engine.
        """
        return {**server, **{k: v for k, v in self.server.items() if k not in SWITCHABLE}}

    def switches(self, server: dict[str, Any]) -> Switches:
        """What is set while the engine runs; `server` as in `start_args`."""
        named = {k: v for k, v in {**server, **self.server}.items() if k in SWITCHABLE}
        return Switches(radix_cache=self.cache != "off" and not server.get("disable_radix_cache", False), **named)

    @property
    def bypass(self) -> Literal["read_only", "write_only"] | None:
        """What every request of this arm is told (`sampling_params.custom_params.probe.cache`)."""
        return self.cache if self.cache in ("read_only", "write_only") else None  # type: ignore[return-value]
