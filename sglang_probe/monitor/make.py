"""Make a profile from recorded runs (`sglang-probe profile`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_probe.errors import ConfigError
from sglang_probe.monitor.profile import profile
from sglang_probe.monitor.reading import Reading
from sglang_probe.monitor.sampling import Sampling
from sglang_probe.monitor.stored import StoredProfile, Watch
from sglang_probe.monitor.trajectories import read, read_monitored
from sglang_probe.run import journal
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.sae.manifest import model_of, refuse_other_model
from sglang_probe.steering.card import Card
from sglang_probe.steering.library import Library, Vector


def from_rows(
    runs: Sequence[Run],
    hook_point: str | None,
    *,
    sae: Path | None = None,
    features: Sequence[int] = (),
    library: Path | None = None,
    vectors: Sequence[str] = (),
    every: int = 16,
    rows: int | None = None,
) -> StoredProfile:
    """A profile of the rows that runs recorded of a hook point, as a server would have sampled them.

    Args:
        hook_point: None: that of the SAE.
        vectors: names in the library, of that hook point; none: all of it that have scores.
        every, rows: see `Watch`.

    Raises:
        ConfigError: as `trajectories.read` and `profile.profile`, or what is watched does not belong together.
    """
    opened = None if sae is None else read_sae(sae, hook_point=hook_point)
    hook_point = hook_point or (None if opened is None else opened.hook_point)
    if hook_point is None:
        raise ConfigError("which rows are watched is not said", fix="give --hook-point, or an SAE that names its own")
    if opened is not None:
        refuse_other_model(opened, runs, str(sae))
    weights = weight_hash(model_of(runs).get("weights_sha256"))
    chosen = {} if library is None else _vectors(Library.open(library), vectors, hook_point, weights)
    tensors = {name: v.vector for name, v in chosen.items()}
    reading = Reading(sae=opened, features=features, vectors=tensors)
    sampling = Sampling(every=every)
    known = read(
        runs, hook_point=hook_point, sae=opened, features=features, rows=rows, vectors=tensors, sampling=sampling
    )
    watch = Watch(
        hook_point=hook_point,
        sampling=sampling,
        rows=rows,
        features=list(features),
        sae_sha256=None if sae is None else weights_sha256(sae),
        vectors={name: v.hash for name, v in chosen.items()},
        columns=list(reading.names),
    )
    usual, _, _ = profile(known)
    return StoredProfile(usual, watch, tensors, model_of(runs).get("name"), weights, _facts(runs))


def from_monitored(runs: Sequence[Run], *, rows: int | None = None, library: Path | None = None) -> StoredProfile:
    """A profile of what a server's monitor read of its own traffic, by whatever rule it had.

    Args:
        rows: None: as many of each request as the monitor read at most.

    Raises:
        ConfigError: as `trajectories.read_monitored` and `profile.profile`; or its vectors are not in the library.
    """
    told: dict[str, Any] = next((r.manifest["monitor"] for r in runs if r.manifest.get("monitor")), {})
    rows = rows or told.get("rows")
    known = read_monitored(runs, rows=rows)
    tensors = {}
    if told["vectors"]:
        if library is None:
            raise ConfigError("the monitor read vectors", fix="give the library that it had, by --library")
        opened = Library.open(library)
        for name, digest in told["vectors"].items():
            if opened[name].hash != digest:
                raise ConfigError(f"vector `{name}` of {library} is another one than the monitor read")
            tensors[name] = opened[name].vector
    names = ("hook_point", "sampling", "features", "sae_sha256", "vectors", "columns")
    watch = Watch.model_validate({**{n: told[n] for n in names}, "rows": rows})
    usual, _, _ = profile(known)
    return StoredProfile(usual, watch, tensors, told.get("model"), told.get("model_weight_hash"), _facts(runs))


def _vectors(library: Library, names: Sequence[str], hook_point: str, weights: str | None) -> dict[str, Vector]:
    chosen = {n: library[n] for n in names} or {
        n: v for n, v in library.items() if v.card.kind in ("probe", "direction") and v.card.hook_point == hook_point
    }
    for name, v in chosen.items():
        card: Card = v.card
        if card.kind not in ("probe", "direction") or card.hook_point != hook_point:
            raise ConfigError(f"`{name}` is a {card.kind} of {card.hook_point}; what is watched is {hook_point}")
        if card.model_weight_hash != weights:
            raise ConfigError(f"`{name}` was made from other weights than those of the runs")
    return chosen


def _facts(runs: Sequence[Run]) -> list[dict[str, str]]:
    return [{"name": r.path.name, "manifest_sha256": journal.sha256(r.path / MANIFEST)} for r in runs]
