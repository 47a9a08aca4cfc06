"""Making vectors: from two sets of prompts, from an SAE, and at random as a control. Each is written with its evidence.

* Mean difference: the mean row of one set of prompts minus that of another ("difference in means": Marks and Tegmark
  2023; Rimsky et al. 2024, CAA; AxBench, Wu et al. 2025, found it the best detector among cheap ones).
* SAE feature: the decoder row, with what is needed to read the feature's activation.
* Random: a direction drawn from the residual's own covariance. An isotropic one is too weak a control, because the
  residual stream has few directions with much variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash
from sglang_probe.sae import manifest
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.steering import contrast, library
from sglang_probe.steering.contrast import Phase, Place
from sglang_probe.steering.library import Vector

if TYPE_CHECKING:
    import torch


_CONTROL = "`splice` with `random_error` is: it keeps the length of each row's error"


@dataclass(frozen=True)
class Target:
    """Where an entry is written, and under which name."""

    folder: Path
    name: str
    overwrite: bool = False


def mean_difference(
    target: Target, positive: Run, negative: Run, hook_point: str, *, phase: Phase, place: Place, seed: int = 0
) -> Vector:
    """Write the mean difference of two runs: towards what `positive` is about.

    Its evidence is the area under the ROC curve by which a vector made from half of the prompts tells the other half
    apart, with an interval, and the cosine of the vectors of both halves.

    Raises:
        ConfigError: the runs are of different models or hold no such rows, or as `library.write`.
    """
    import torch

    model, digest = contrast.model_of([positive, negative])
    a, b = (contrast.rows_of(run, hook_point, phase=phase, place=place) for run in (positive, negative))
    found = contrast.separation(a, b, seed=seed)
    v = contrast.mean_difference(a.x_ND, b.x_ND)
    return library.write(
        target.folder,
        {library.VECTOR: torch.from_numpy(v)},
        overwrite=target.overwrite,
        name=target.name,
        kind="direction",
        hook_point=hook_point,
        model=model,
        model_weight_hash=digest,
        layer_mean_norm=contrast.mean_norm([a, b]),
        made_by={
            "command": "vector make mean-difference",
            "inputs": {
                **contrast.inputs(positive, negative, a, b),
                "position": place,
            },
            "seeds": {"split": seed},
            "phase": phase,
        },
        evidence=found.told(),
    )


def random_control(
    target: Target,
    run: Run,
    hook_point: str,
    *,
    seed: int,
    norm: float | None = None,
    like: Vector | None = None,
    rows: int = 20_000,
) -> Vector:
    """Write a random direction with the covariance of a run's rows.

    Args:
        norm: of the vector; None: that of `like`, or the mean norm of the rows.
        like: the vector that it is a control for, whose norm and whose unit `mean_norm` it gets.
        rows: of the run at most, drawn at random.

    Raises:
        ConfigError: the run holds no such rows, or as `library.write`.
    """
    if like is not None and like.card.norm is None:
        raise ConfigError(f"`{like.name}` is an SAE, and a random direction is no control for one", fix=_CONTROL)
    model, digest = contrast.model_of([run])
    x, told = contrast.sample_rows(run, hook_point, rows=rows, seed=seed)
    v = random_direction(x, seed=seed)
    unit = float(told["mean_norm"])
    length = norm or unit
    if like is not None and like.card.norm is not None:  # in the same units, so that equal strengths are equal doses
        length, unit = like.card.norm, like.card.layer_mean_norm or unit
    return library.write(
        target.folder,
        {library.VECTOR: v / v.norm() * length},
        overwrite=target.overwrite,
        name=target.name,
        kind="direction",
        hook_point=hook_point,
        model=model,
        model_weight_hash=digest,
        layer_mean_norm=unit,
        made_by={
            "command": "vector make random",
            "inputs": {
                "rows_of": {**contrast.origin(run), **told},
                "like": None if like is None else {"name": like.name, "hash": like.hash},
            },
            "seeds": {"rows": seed, "direction": seed},
        },
        evidence={"control": "a direction drawn from the covariance of the rows; no effect was asked of it"},
    )


def random_direction(x_ND: torch.Tensor, *, seed: int) -> torch.Tensor:
    """A normal vector with the covariance of the rows, float64 `[d]`: `(x - mean)^T g / sqrt(n - 1)`, g standard
    normal. The matrix itself is never made."""
    import torch

    x = x_ND.double()
    g = torch.randn(len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x - x.mean(0)).T @ g / (len(x) - 1) ** 0.5


@dataclass(frozen=True)
class SaeFeature:
    """One feature of an SAE: its tensors as a library has them, and where it comes from."""

    tensors: Mapping[str, torch.Tensor]
    hook_point: str
    model: str
    origin: Mapping[str, Any]


def read_sae_feature(folder: Path, index: int, *, direction: bool = False, hook_point: str | None = None) -> SaeFeature:
    """One feature of an SAE.

    Args:
        direction: the decoder row alone, whatever the architecture.
        hook_point: for folders that do not say where the SAE belongs.

    Raises:
        ConfigError: the SAE cannot be read (`sae.folder.read_sae`); there is no such feature; its activation does not
            follow from its own weights, as with TopK, where all features compete; or no hook point is known.
    """
    import torch

    sae = read_sae(folder, hook_point=hook_point)
    if not 0 <= index < sae.latents:
        raise ConfigError(f"{folder} has features 0 to {sae.latents - 1}, and no feature {index}")
    if sae.hook_point is None:
        raise ConfigError(f"{folder} does not say where its rows come from", fix="give `--hook-point`")
    if not direction and not sae.elementwise:
        raise ConfigError(
            f"the activation of one feature of this SAE ({sae.architecture}, rows normalised: {sae.normalize}) does "
            "not follow from its own weights",
            fix="use a BatchTopK (saved as jumprelu) or standard SAE, or `--direction` to take the decoder row alone, "
            "which can be added and projected out",
        )
    tensors = {library.VECTOR: sae.W_dec[index]}
    if not direction:
        tensors[library.ENCODER] = sae.W_enc[:, index]
        tensors[library.ENCODER_BIAS] = sae.b_enc[index]
        tensors[library.THRESHOLD] = torch.tensor(0.0) if sae.threshold is None else sae.threshold[index]
        if sae.apply_b_dec_to_input:
            tensors[library.DECODER_BIAS] = sae.b_dec
    origin = {
        "sae": folder.name,
        "weights_sha256": weights_sha256(folder),
        "feature": index,
        "architecture": sae.architecture,
    }
    return SaeFeature(tensors, sae.hook_point, str(sae.metadata.get("model_name") or "unknown"), origin)


def sae_feature(
    target: Target,
    folder: Path,
    index: int,
    run: Run,
    *,
    direction: bool = False,
    trust: bool = False,
    hook_point: str | None = None,
    sampled: tuple[torch.Tensor, dict[str, Any]] | None = None,
) -> Vector:
    """Write a feature of an SAE. `run` has rows of its hook point, of the model that it was trained on: the weights'
    hash, the layer's mean norm, and the feature's rate and 99th percentile come from there.

    Args:
        direction: its decoder row alone.
        trust: take an SAE that does not say which model it is of, or names it otherwise than the run.
        hook_point: for folders that do not say where the SAE belongs.
        sampled: what `contrast.sample_rows` gave of that run, for several features.

    Raises:
        ConfigError: as `read_sae_feature`; the SAE is of another model; or as `library.write`.
    """
    found = read_sae_feature(folder, index, direction=direction, hook_point=hook_point)
    model, digest = contrast.model_of([run])
    if not trust and contrast.without_path(found.model) != model:
        raise ConfigError(
            f"the SAE is of model `{found.model}`, and {run.path} of `{model}`",
            fix="give a run of the SAE's model; if these are two names of one, `--same-model` says so",
        )
    x, told = sampled or contrast.sample_rows(run, found.hook_point, rows=200_000, seed=0)
    evidence: dict[str, Any] = {"rows": told["rows"]}
    percentile = None
    if not direction:
        z = activations(x, found.tensors)
        active = z[z > 0]
        evidence |= {"rate": len(active) / len(z)}
        percentile = float(np.quantile(active, 0.99)) if len(active) else None
    return library.write(
        target.folder,
        found.tensors,
        overwrite=target.overwrite,
        name=target.name,
        kind="direction" if direction else "feature",
        hook_point=found.hook_point,
        model=model,
        model_weight_hash=digest,
        layer_mean_norm=told["mean_norm"],
        percentile99=percentile,
        made_by={
            "command": "vector make sae-feature",
            "inputs": {"sae": dict(found.origin), "rows_of": {**contrast.origin(run), **told}},
            "seeds": {"rows": 0},
        },
        evidence=evidence,
    )


def whole_sae(
    target: Target, folder: Path, run: Run | None = None, *, trust: bool = False, hook_point: str | None = None
) -> Vector:
    """Write an entry for a whole SAE, whose reconstruction can take the place of rows (`splice`).

    Args:
        run: of its model, for SAEs that do not say from whose weights their rows came.
        trust, hook_point: as `sae_feature`.

    Raises:
        ConfigError: the SAE cannot be read; whose weights it belongs to is not known, or not those of the run; or as
            `library.write_sae_entry`.
    """
    sae = read_sae(folder, hook_point=hook_point)
    if sae.hook_point is None:
        raise ConfigError(f"{folder} does not say where its rows come from", fix="give `--hook-point`")
    told = manifest.of(sae) or {}
    theirs = weight_hash((told.get("model") or {}).get("weights_sha256"))
    model = contrast.without_path(str(sae.metadata.get("model_name") or "unknown"))
    digest = theirs
    if run is not None:
        named, digest = contrast.model_of([run])
        if theirs is None and not trust and model != named:
            raise ConfigError(
                f"the SAE is of model `{model}`, and {run.path} of `{named}`",
                fix="give a run of the SAE's model; if these are two names of one, `--same-model` says so",
            )
        if theirs is not None and digest is not None and theirs != digest:
            raise ConfigError(f"{folder} was trained on rows of other weights than those of {run.path}")
        model, digest = named, digest or theirs
    if digest is None:
        raise ConfigError(
            f"{folder} does not say from whose weights its rows came", fix="give `--run`, a run of its model"
        )
    return library.write_sae_entry(
        target.folder,
        folder,
        overwrite=target.overwrite,
        name=target.name,
        hook_point=sae.hook_point,
        model=model,
        model_weight_hash=digest,
        made_by={
            "command": "vector make sae",
            "inputs": {"sae": folder.name, "weights_sha256": weights_sha256(folder)},
        },
        evidence=_evaluated(told),
    )


def _evaluated(told: Mapping[str, Any]) -> dict[str, Any]:
    """What its training found of an SAE."""
    found = told.get("evaluation") or {}
    return {n: found[n] for n in ("explained_variance", "l0", "dead_share", "rows") if n in found}


def activations(x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Activations `[n]` of a feature: `relu(pre)` where `pre > threshold`, `pre = (x - decoder_bias) @ encoder +
    encoder_bias` (SAELens 6, `saes/*.py`)."""
    x = x_ND.double()
    encoder = tensors[library.ENCODER].double()
    pre = x @ encoder + tensors[library.ENCODER_BIAS].double()
    if library.DECODER_BIAS in tensors:
        pre = pre - tensors[library.DECODER_BIAS].double() @ encoder
    return np.asarray((pre.clamp(min=0) * (pre > tensors[library.THRESHOLD].double())).numpy())


def projections(x_ND: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Projections `[n]` of rows on a direction, `x @ v` with `v` of length 1."""
    v = tensors[library.VECTOR].double()
    return np.asarray((x_ND.double() @ (v / v.norm())).numpy())
