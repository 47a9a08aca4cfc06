"""What the numbers of a drift study depend on; printed with them."""

from __future__ import annotations

from pydantic import Field

from sglang_probe.config import Config


class DriftOptions(Config):
    """Options of `sglang-probe query-drift`."""

    window: int = Field(default=32, ge=2)
    """Last prompt positions, whose queries eviction methods score with."""
    sinks: int = Field(default=4, ge=0)
    """First positions: left out of mean queries and of candidates."""
    edges: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256)
    """Bins of distances in which decode queries are compared with prompt queries as far apart."""
    energy: float = Field(default=0.9, gt=0, lt=1)
    """Share of the window's energy that its subspace holds."""
    budget: float = Field(default=0.25, gt=0, lt=1)
    """Kept share of the prompt where a kept set is judged; sinks and window included."""
    delta: float = 0.0
    """Advantage over the baseline below which the window no longer predicts."""
    run: int = Field(default=3, ge=1)
    """Consecutive steps below it that end the horizon."""
    permutations: int = Field(default=39, ge=1)
    """Orders of blocks of steps that a change point is compared with."""
    placebos: int = Field(default=8, ge=1)
    """Borders inside the prompt at which a request is measured as at its end, where it is long enough."""

    @property
    def shortest_prompt(self) -> int:
        """Prompt positions that a request must have: two windows that do not touch, and sinks."""
        return 2 * self.window + self.sinks + 1

    @property
    def fewest_steps(self) -> int:
        """Decode steps that a request must have."""
        return 8
