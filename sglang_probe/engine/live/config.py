"""The `live` section of the probe's YAML: its presence makes a server's recording a live one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sglang_probe.config import Config
from sglang_probe.remote.config import UploadConfig

Privacy = Literal["ids", "hashes", "none"]


class SegmentLimits(Config):
    """When the current segment is due to be closed: whichever limit is reached first."""

    max_seconds: float = Field(default=3600.0, gt=0)
    """Age of a segment."""
    max_megabytes: float = Field(default=512.0, gt=0)
    """Size of its files on disk; one part more may come on top."""
    max_requests: int = Field(default=20_000, gt=0)
    """Finished requests. Also bounds the memory that closing a segment takes."""
    min_seconds: float = Field(default=2.0, ge=0)
    """Age before which a segment is not closed on demand (`POST /probe/flush`, an update of the weights): whoever asks
    earlier waits, and all who wait are answered with one closing."""
    patience: float = Field(default=5.0, ge=0)
    """How long a due segment waits for a moment without requests in flight before they are cut in two."""

    def reached(self, *, seconds: float, megabytes: float, requests: int) -> bool:
        """Whether a segment of this age and size is due to be closed."""
        return seconds >= self.max_seconds or megabytes >= self.max_megabytes or requests >= self.max_requests


class AnswersConfig(Config):
    """How much disk, time and memory the rows may take that requests ask for (`asks: [rows]`)."""

    most_megabytes: float = Field(default=64.0, gt=0)
    """For the rows of one request: one that asks for more is refused."""
    megabytes: float = Field(default=512.0, gt=0)
    """For all rows that wait on disk to be fetched. Those that were fetched are deleted for new ones, the oldest first;
    if all others have not been fetched, the new ones are not kept."""
    seconds: float = Field(default=300.0, gt=0)
    """How long rows wait to be fetched."""
    memory_megabytes: float = Field(default=256.0, gt=0)
    """For the latest rows of all requests, kept in memory: reused positions get their rows from there. As much again
    may wait to be put there."""

    @property
    def memory(self) -> float:
        """Bytes of rows in memory."""
        return self.memory_megabytes * 1e6

    @model_validator(mode="after")
    def _one_fits(self) -> AnswersConfig:
        if self.most_megabytes > self.megabytes:
            raise ValueError("`most_megabytes` of one request are more than the `megabytes` of all")
        return self


class LiveConfig(Config):
    """How a live server is recorded."""

    privacy: Privacy = "none"
    """What is written of prompts and outputs. `ids`: token ids. `hashes`: one keyed hash a prompt, and one of each of
    its prefixes with the output, so that equal beginnings can be recognised within one server process. `none`:
    nothing. Text is never written."""
    segments: SegmentLimits = SegmentLimits()
    """When a segment is closed and the next one begun."""
    queue: int = Field(default=1024, ge=1)
    """Forward passes that may wait for the disk before facts are dropped: bounds the probe's memory."""
    when_full: Literal["block", "drop"] | None = None
    """What happens when `queue` is full. `drop`: facts are lost, and the ledger says which. `block`: the scheduler
    waits for the disk. By default `drop`, because requests come first; with hook points `block`, because rows cannot be
    dropped."""
    causes: bool = False
    """Whether `/metrics` has the causes of computed prompt tokens. They are found for each segment when it is closed,
    by a process of the lowest priority; `privacy` must be `ids` or `hashes`."""
    traces: bool = False
    """Whether SGLang's OpenTelemetry spans of requests (`--enable-trace`) get what the ledger knows of the request, as
    counts and ids. SGLang 0.5.23 only."""
    rows: AnswersConfig = AnswersConfig()
    """Bounds of the rows that requests ask for (`asks: [rows]`)."""
    upload: UploadConfig | None = None
    """Copy the segments to an object store or another file system, part by part, by a process of the lowest priority:
    `{to: s3://bucket/path}`. A target that is down does not hold up the recording: the copy lags, and
    `GET /probe/status` says so. Absent: they are not copied."""
    recent: int = Field(default=100, ge=0, le=10_000)
    """Requests listed by `GET /probe/coverage`."""

    @model_validator(mode="after")
    def _causes_need_prompts(self) -> LiveConfig:
        if self.causes and self.privacy == "none":
            raise ValueError("`causes` needs to know which prompts began alike: `privacy: hashes`, or `ids`")
        return self
