"""The YAML of `sglang-probe row-counts`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from sglang_probe.config import FolderName
from sglang_probe.harvest.config import WorkloadRecording, refuse_ends, refuse_rows
from sglang_probe.run.hook_points import EMBED
from sglang_probe.workload.build import WorkloadConfig
from sglang_probe.workload.documents import Documents

Count = Annotated[int, Field(ge=1)]


class RowCountsConfig(WorkloadRecording):
    """The same tokens at the same positions, computed in forwards of different numbers of rows."""

    name: FolderName | None = None
    """Name of the study's folder; by default the name of the YAML file."""
    workload: WorkloadConfig = Field(default_factory=lambda: Documents(count=12, chars=1000))
    """Where the texts come from; by default excerpts of Python's standard library."""
    hook_points: list[str] = Field(
        default_factory=lambda: [EMBED, "blocks.0.attn.hook_v", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post"]
    )
    """Rows to compare. `blocks.0.attn.hook_v` follows one product; `blocks.0.hook_resid_post` follows attention too."""
    prefix_tokens: int = Field(default=64, ge=1)
    """Tokens of each text that are in the cache before; the counted rows come after them."""
    row_counts: list[Count] = Field(default_factory=lambda: list(range(1, 65)), min_length=1)
    """Prefill: tokens that a forward computes after the prefix, for one request alone."""
    decode_batches: list[Count] = Field(default_factory=lambda: [1, 2, 3, 4, 8, 16, 32, 64])
    """Decode: requests that are decoded together; `[]` leaves decoding out."""
    decode_steps: int = Field(default=4, ge=1)
    """Tokens of each text that are decoded, by force, after the prefix."""
    sampling: dict[str, Any] = Field(default_factory=lambda: {"temperature": 0.0})
    """Has no effect on what is compared: outputs are forced, or a single token."""

    @field_validator("row_counts", "decode_batches")
    @classmethod
    def _once_each(cls, counts: list[int]) -> list[int]:
        return sorted(set(counts))

    @model_validator(mode="after")
    def _compares_rows(self) -> RowCountsConfig:
        refuse_rows(self)
        refuse_ends(self.sampling, "decode_steps")
        if not [p for p in self.hook_points if p != EMBED]:
            raise ValueError("this study compares rows: `hook_points` must name some beside the embedding")
        return self

    @property
    def length(self) -> int:
        """Tokens that a text must have."""
        return self.prefix_tokens + max(*self.row_counts, self.decode_steps + 1 if self.decode_batches else 1)
