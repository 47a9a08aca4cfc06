"""The card of a vector: where it belongs, how it was made, and what is known of its effect."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from sglang_probe.config import Config
from sglang_probe.errors import ConfigError
from sglang_probe.run.hook_points import RESID_POST, parse_hook_point

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile("[0-9a-f]{64}")


def vector_name(name: str) -> str:
    """The name of a vector, which is that of its files and never a path.

    Raises:
        ValueError: it is none.
    """
    if not NAME.fullmatch(name) or name.endswith((".json", ".safetensors")):
        raise ValueError(
            f"{name!r} is no name of a vector: letters, digits, `.`, `_`, `-`, at most 100, the first a letter or digit"
        )
    return name


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{text!r} is no SHA-256 in hexadecimal")
    return text


def file_name(text: str) -> str:
    """The name of a file in a folder.

    Raises:
        ValueError: it is a path.
    """
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise ValueError(f"{text!r} is no name of a file")
    return text


def residual_point(name: str) -> str:
    """The name of a hook point in the residual stream after a layer.

    Raises:
        ValueError: it is another.
    """
    try:
        point = parse_hook_point(name)
    except ConfigError as e:
        raise ValueError(str(e)) from None
    if point.site != RESID_POST:
        raise ValueError(f"`{name}` is not in the residual stream after a layer: give `blocks.<layer>.{RESID_POST}`")
    return name


VectorName = Annotated[str, AfterValidator(vector_name)]
Digest = Annotated[str, AfterValidator(_digest)]


class MadeBy(Config):
    """How an entry was made, so that it can be made again."""

    command: str
    """The command, e.g. `vector make mean-difference`."""
    inputs: dict[str, Any] = Field(default_factory=dict)
    """What it read: run directories with the hash of their manifests, SAE folders with the hash of their weights."""
    seeds: dict[str, int] = Field(default_factory=dict)
    """Seeds by what was drawn."""
    phase: Literal["prefill", "decode"] | None = None
    """Rows of which phase it was made from."""


def _relative(text: str) -> str:
    if not text or text.startswith(("/", "~")) or "\\" in text:
        raise ValueError(f"{text!r} is no folder relative to the library")
    return text


class SaeFolder(Config):
    """Where the SAE of an entry lies (`sae_entry.py`)."""

    folder: Annotated[str, AfterValidator(_relative)]
    """Relative to the library: inside it, or beside it (`../NAME`)."""
    files: dict[Annotated[str, AfterValidator(file_name)], Digest] = Field(min_length=1)
    """SHA-256 of each of its files."""


class Card(Config):
    """What is known of one entry of a library."""

    name: VectorName
    """Its name, which is that of its files."""
    kind: Literal["direction", "feature", "probe", "sae"]
    """`direction`: to add or project out. `feature`: of an SAE, to clamp, cap or ablate as well. `probe`: to score rows
    and open gates. `sae`: a whole SAE, to `splice`."""
    hook_point: Annotated[str, AfterValidator(residual_point)]
    """Where its rows are: `blocks.<layer>.hook_resid_post`."""
    width: PositiveInt
    """d, the width of the residual stream."""
    model: str
    """Name of the model, for people."""
    model_weight_hash: Digest | None
    """`weight_hash` of the model whose rows made it; None: unknown, and then no engine takes it."""
    norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Euclidean norm of `vector`; of an `sae` none."""
    sae: SaeFolder | None = None
    """Of an `sae`: its folder."""
    layer_mean_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Mean norm of the rows at the hook point, sinks left out: the unit `mean_norm` of strengths."""
    percentile99: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Of a feature: 99th percentile of its activation on the rows on which it is active: the unit `p99`."""
    made_by: MadeBy
    """How it was made."""
    evidence: dict[str, Any] = Field(default_factory=dict)
    """What was measured of it, with intervals."""
    sha256: Digest
    """Of the file of tensors; of an `sae` that of its weights."""

    @model_validator(mode="after")
    def _of_its_kind(self) -> Card:
        if (self.kind == "sae") != (self.sae is not None):
            raise ValueError("`sae` is the folder of an entry of kind `sae`, and of no other")
        if (self.kind == "sae") != (self.norm is None):
            raise ValueError("`norm` is that of the vector of an entry; an SAE has none")
        return self

    @property
    def layer(self) -> int:
        """The layer after which the hook point is."""
        layer = parse_hook_point(self.hook_point).layer
        assert layer is not None  # `residual_point`
        return layer
