"""An arm: a named policy, as the server arguments that make it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from sglang_probe.config import Config


class Arm(Config):
    """One side of a comparison.

    `cache: off` disables SGLang's radix cache, the clean no-reuse arm: nothing is matched and nothing is published
    that a later request could be rebound to. (`SGLANG_RADIX_FORCE_MISS` is not clean; see DESIGN section 7.)
    """

    cache: Literal["on", "off"] = "on"
    server: dict[str, Any] = Field(default_factory=dict)
    """Further SGLang server arguments, over those of the experiment."""

    @field_validator("cache", mode="before")
    @classmethod
    def _yaml_reads_on_and_off_as_booleans(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    def server_args(self) -> dict[str, Any]:
        """SGLang server arguments of this arm."""
        return {"disable_radix_cache": self.cache == "off", **self.server}
