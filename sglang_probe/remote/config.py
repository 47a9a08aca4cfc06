"""The `upload` section of a recording's YAML."""

from __future__ import annotations

from pydantic import Field, field_validator

from sglang_probe.config import Config


class UploadConfig(Config):
    """Where a recording is copied to while it is made, part by part."""

    to: str
    """URL of a folder of an object store or of another file system, as fsspec writes it: `s3://bucket/runs/mine`,
    `gs://...`, `file:///mnt/shared/...`. Its driver (`s3fs`, `gcsfs`, ...) must be installed, and finds its credentials
    itself."""
    patience: float = Field(default=300.0, gt=0)
    """After the recording has ended: give up after so many seconds without progress. The rest can be copied later
    (`sglang-probe upload`, or `--resume` of a harvest)."""

    @field_validator("to")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if "://" not in url:
            raise ValueError(f"`{url}` is no URL: `s3://bucket/path`, or `file:///path` for a folder of this machine")
        return url
