"""A profile as a folder, from which a server judges: `profile.json` and `profile.safetensors`.

The JSON says what was read, by which rule, of which model, and has the SHA-256 of the tensors; these are the scores of
the reference, the principal components, and the vectors that are read. An SAE is named by the hash of its weights and
stays where it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from sglang_probe.config import Config, parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.monitor.profile import Profile
from sglang_probe.monitor.reading import Reading
from sglang_probe.monitor.sampling import Sampling
from sglang_probe.run import journal
from sglang_probe.sae.folder import read_sae, weights_sha256

if TYPE_CHECKING:
    import torch

JSON, TENSORS = "profile.json", "profile.safetensors"
_MOST_BYTES = 64 << 20
_FIX = "make the profile again (`sglang-probe profile`), or restore it from a copy"


class Watch(Config):
    """What a monitor reads, and by which rule."""

    hook_point: str
    """`blocks.N.hook_resid_post`."""
    sampling: Sampling = Sampling()
    """Which decode rows are read."""
    rows: int | None = Field(default=None, ge=1)
    """A trajectory is the first so many rows that are read of a request, and shorter ones are not judged; null: all,
    judged when the request ends."""
    features: list[int] = Field(default_factory=list)
    """Latents of the SAE whose activations are columns."""
    sae_sha256: str | None = None
    """Of the SAE's weights; null: none is read."""
    vectors: dict[str, str] = Field(default_factory=dict)
    """Hash of each vector's library entry, by the name of its column."""
    columns: list[str] = Field(min_length=1)
    """What is read of a row, in this order."""


class _Stored(Config):
    version: Literal[1] = 1
    watch: Watch
    model: str | None = None
    model_weight_hash: str | None = None
    runs: list[dict[str, Any]] = Field(default_factory=list)
    statistics: list[str] = Field(min_length=1)
    centre: list[float]
    spread: list[float]
    quantiles: list[dict[str, Any]]
    references: int = Field(ge=1)
    tensors_sha256: str


@dataclass(frozen=True)
class StoredProfile:
    """A profile, and what it is of."""

    profile: Profile
    watch: Watch
    vectors: Mapping[str, torch.Tensor]
    """Float32 `[D]` by the name of their column."""
    model: str | None
    model_weight_hash: str | None
    runs: Sequence[Mapping[str, Any]]
    """Of each run of the reference: `name`, `manifest_sha256`."""
    sha256: str = ""
    """Of `profile.json`."""

    def reading(self, sae: Path | None) -> Reading:
        """What reads the columns.

        Args:
            sae: folder of the SAE that it watches; None where it watches none.

        Raises:
            ConfigError: it is another SAE, or one too many or too few.
        """
        return reading_of(self.watch, sae, self.vectors)


def reading_of(watch: Watch, sae: Path | None, vectors: Mapping[str, torch.Tensor]) -> Reading:
    """What reads the columns of `watch`.

    Raises:
        ConfigError: `sae` is another one than `watch` is of, or one too many or too few.
    """
    if (sae is None) != (watch.sae_sha256 is None):
        told = "reads none" if watch.sae_sha256 is None else f"needs that with weights {watch.sae_sha256[:12]}"
        raise ConfigError(f"`sae`: the profile {told}")
    found = None
    if sae is not None:
        if (digest := weights_sha256(sae)) != watch.sae_sha256:
            raise ConfigError(
                f"`sae`: {sae} has weights {digest[:12]}, and the profile was made with {str(watch.sae_sha256)[:12]}",
                fix="give the SAE that the profile was made with, or make the profile again",
            )
        found = read_sae(sae, hook_point=watch.hook_point)
    reading = Reading(sae=found, features=watch.features, vectors=vectors)
    if list(reading.names) != watch.columns:
        raise ConfigError(f"the profile has the columns {', '.join(watch.columns)}, and these are {reading.names}")
    return reading


def write_profile(folder: Path, stored: StoredProfile, *, overwrite: bool = False) -> None:
    """Write a profile; `profile.json` comes last.

    Raises:
        ConfigError: one is there, and `overwrite` was not said.
    """
    import torch
    from safetensors.torch import save

    if (folder / JSON).exists() and not overwrite:
        raise ConfigError(f"{folder} has a profile already", fix="choose another folder, or give `--overwrite`")
    p = stored.profile
    tensors = {"reference": torch.from_numpy(p.reference[p.statistics].to_numpy(np.float64).copy())}
    if p.whitening is not None:
        tensors["mean"], tensors["components"] = (torch.from_numpy(np.ascontiguousarray(x)) for x in p.whitening)
    tensors |= {f"vector: {name}": v.float().contiguous() for name, v in stored.vectors.items()}
    data = save(tensors)
    told = _Stored(
        watch=stored.watch,
        model=stored.model,
        model_weight_hash=stored.model_weight_hash,
        runs=[dict(r) for r in stored.runs],
        statistics=p.statistics,
        centre=p.centre.tolist(),
        spread=p.spread.tolist(),
        quantiles=p.quantiles.to_dict("records"),
        references=len(p.reference),
        tensors_sha256=hashlib.sha256(data).hexdigest(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).unlink(missing_ok=True)

    def put(path: Path) -> None:
        path.write_bytes(data)

    journal.write_durably(folder / TENSORS, put)
    journal.write_text_durably(folder / JSON, json.dumps(told.model_dump(mode="json"), indent=1) + "\n")


def read_profile(folder: Path) -> StoredProfile:
    """Read a profile.

    Raises:
        ConfigError: it is not there, or was changed.
    """
    from safetensors.torch import load

    try:
        text = (folder / JSON).read_text(encoding="utf-8")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it holds no mapping")
        if (folder / TENSORS).stat().st_size > _MOST_BYTES:
            raise ValueError(f"{TENSORS} is longer than {_MOST_BYTES:,} bytes")
        data = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as e:
        raise ConfigError(f"{folder} holds no profile: {e}", fix=_FIX) from e
    told = parse_config(found, _Stored, where=str(folder / JSON))
    if hashlib.sha256(data).hexdigest() != told.tensors_sha256:
        raise ConfigError(f"{folder / TENSORS} was changed after {JSON} was written", fix=_FIX)
    tensors = load(data)
    s = len(told.statistics)
    reference = tensors.get("reference")
    if (
        reference is None
        or tuple(reference.shape) != (told.references, s)
        or {len(told.centre), len(told.spread)} != {s}
    ):
        raise ConfigError(f"{folder} is damaged: its parts do not fit each other", fix=_FIX)
    whitening = None
    if "components" in tensors:
        whitening = (tensors["mean"].numpy(), tensors["components"].numpy())
    profile = Profile(
        pd.Series(told.centre, index=told.statistics),
        pd.Series(told.spread, index=told.statistics),
        pd.DataFrame(reference.numpy(), columns=told.statistics),
        pd.DataFrame(told.quantiles),
        whitening,
    )
    vectors = {name: tensors[f"vector: {name}"] for name in told.watch.vectors}
    digest = hashlib.sha256(text.encode()).hexdigest()
    return StoredProfile(profile, told.watch, vectors, told.model, told.model_weight_hash, told.runs, digest)
