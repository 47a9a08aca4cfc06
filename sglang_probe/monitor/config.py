"""The `monitor` section of a server's configuration."""

from __future__ import annotations

from pydantic import Field, model_validator

from sglang_probe.config import Config, InputPath
from sglang_probe.errors import ConfigError
from sglang_probe.monitor.sampling import Sampling
from sglang_probe.run.hook_points import RESID_POST, parse_hook_point

_COLLECTS = ("hook_point", "features", "library", "vectors", "sampling", "rows")


MOST_PROJECTIONS = 64
"""Features and vectors that are recorded of a row where no token ids may be: enough of them say what a row was, and
rows can be inverted to text."""


def check_projections(count: int) -> None:
    """Refuse to record so many numbers of each row where no token ids are recorded.

    Raises:
        ConfigError: they are too many.
    """
    if count > MOST_PROJECTIONS:
        raise ConfigError(
            f"`monitor`: {count:,} features and vectors of each row can be inverted to text like the row itself; "
            f"without token ids at most {MOST_PROJECTIONS} are recorded",
            fix="name fewer of them, or record token ids too: `live: {privacy: ids}`",
        )


class MonitorConfig(Config):
    """What is read of decode rows while a server serves, and judged.

    With `profile` requests are judged by it, and it says what is read and how rows are sampled. Without one the numbers
    are recorded and nothing is judged: `sglang-probe profile` makes a profile of them.
    """

    profile: InputPath | None = None
    """Folder that `sglang-probe profile` wrote."""
    sae: InputPath | None = None
    """Folder of the SAE that is read, if one is."""
    share: float = Field(default=0.01, gt=0, lt=1)
    """Share of requests that may alarm falsely, over all statistics."""
    rate: float = Field(default=0.001, gt=0, lt=1)
    """False alarms of the stream, per request, over all statistics."""
    recent: int = Field(default=100, ge=1, le=1000)
    """Alerts that `GET /probe/alerts` can list."""
    hook_point: str | None = None
    """Without a profile: whose rows are read, `blocks.N.hook_resid_post`."""
    features: list[int] = Field(default_factory=list)
    """Without a profile: latents of the SAE whose activations are recorded."""
    library: InputPath | None = None
    """Without a profile: folder of vectors."""
    vectors: list[str] = Field(default_factory=list)
    """Without a profile: probes and directions of that library whose scores are recorded."""
    sampling: Sampling = Sampling()
    """Without a profile: which decode rows are read."""
    rows: int | None = Field(default=None, ge=1)
    """Without a profile: the most rows that are read of a request; null: no bound."""

    @model_validator(mode="after")
    def _fits(self) -> MonitorConfig:
        if self.profile is not None:
            for name in _COLLECTS:
                if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"`{name}` is what the profile says: leave it out, or leave `profile` out")
            return self
        if self.hook_point is None:
            raise ValueError("name a `profile` to judge by, or a `hook_point` whose rows are read")
        try:
            if parse_hook_point(self.hook_point).site != RESID_POST:
                raise ValueError(f"`hook_point` is `blocks.N.{RESID_POST}`, not `{self.hook_point}`")
        except ConfigError as e:
            raise ValueError(str(e)) from None
        if self.features and self.sae is None:
            raise ValueError("`features` needs `sae`, whose features they are")
        if bool(self.vectors) != (self.library is not None):
            raise ValueError("`vectors` and `library` belong together")
        return self
