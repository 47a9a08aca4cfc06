"""A sparse autoencoder as tensors: encode, decode, single features, and the two foldings of its weights.

Formulas as in SAELens 6.54 (`saes/*.py`), whose folders `sglang_probe.sae.folder` opens and writes. With residual `x`
`[D]` and M latents:

    pre  = (x - b_dec if it says so else x) @ W_enc + b_enc
    z    = relu(pre)                                standard (Bricken et al. 2023)
    z    = relu(pre) where pre > threshold          jumprelu (Rajamanoharan et al. 2407.14435)
    z    = relu of the k largest pre, else 0        topk (Gao et al. 2406.04093)
    x^   = z @ W_dec + b_dec

A BatchTopK SAE (Bussmann et al. 2412.06410) is a jumprelu one with one shared threshold, once it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from sglang_probe.errors import ConfigError

if TYPE_CHECKING:
    import torch

Architecture = Literal["standard", "jumprelu", "topk"]
Normalize = Literal["none", "layer_norm", "constant_norm_rescale"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
NORMALIZE: tuple[str, ...] = get_args(Normalize)
_LAYER_NORM_EPS = 1e-5
_LEAST_NORM = 1e-8


@dataclass(frozen=True)
class SAE:
    """Weights of one SAE, float32 unless it was opened with another dtype; nothing here has a gradient."""

    architecture: Architecture
    W_enc: torch.Tensor
    """[D, M]"""
    W_dec: torch.Tensor
    """[M, D]"""
    b_enc: torch.Tensor
    """[M]"""
    b_dec: torch.Tensor
    """[D]"""
    threshold: torch.Tensor | None = None
    """[M]; of `jumprelu`."""
    k: int | None = None
    """Latents of a row that may be active; of `topk`."""
    apply_b_dec_to_input: bool = True
    rescale_by_decoder_norm: bool = False
    """Of `topk`: whether the k largest are chosen as if decoder rows had unit norm."""
    normalize: Normalize = "none"
    """What is done to a row before it is encoded, and undone after it is decoded."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Of SAELens' configuration: `hook_name`, `model_name`, and our manifest (`sglang_probe.sae.manifest`)."""

    def __post_init__(self) -> None:
        d, m = self.W_enc.shape if self.W_enc.ndim == 2 else (-1, -1)
        wanted = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": (m,), "b_dec": (d,)}
        if self.architecture not in ARCHITECTURES:
            raise ConfigError(f"an SAE of architecture `{self.architecture}` cannot be read: one of {ARCHITECTURES}")
        if self.normalize not in NORMALIZE:
            raise ConfigError(f"`normalize_activations: {self.normalize}` cannot be used: one of {NORMALIZE}")
        if self.architecture == "jumprelu":
            wanted["threshold"] = (m,)
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape or -1 in shape:
                found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise ConfigError(f"the SAE's `{name}` is {found}; its other weights ask for {list(shape)}")
            if not bool(tensor.isfinite().all()):
                raise ConfigError(f"the SAE's `{name}` holds values that are not finite")
        if self.architecture == "topk" and not (self.k is not None and 1 <= self.k <= m):
            raise ConfigError(f"a topk SAE of {m} latents has `k` {self.k}")

    @property
    def width(self) -> int:
        """D: numbers in a row."""
        return int(self.W_enc.shape[0])

    @property
    def latents(self) -> int:
        """M: latents of the dictionary, alive or dead."""
        return int(self.W_enc.shape[1])

    @property
    def hook_point(self) -> str | None:
        """Where its rows come from; None where the folder does not say."""
        # `in`, because a typing error must not read as "nothing said".
        return str(self.metadata["hook_name"]) if self.metadata.get("hook_name") else None

    @property
    def elementwise(self) -> bool:
        """Whether a latent can be computed without the others. Not of `topk`: whether a latent is among the k largest
        depends on all of them; nor where rows are normalised, because then a latent has no fixed decoder row."""
        return self.architecture != "topk" and self.normalize == "none"

    @cached_property
    def decoder_norms(self) -> torch.Tensor:
        """[M]"""
        return self.W_dec.norm(dim=-1).clamp(min=_LEAST_NORM)

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """What the activation function sees, `[..., D]` to `[..., M]`, in the SAE's dtype."""
        return self._pre(self._normalized(x)[0])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations of all latents, `[..., D]` to `[..., M]`, at least 0, in the SAE's dtype."""
        return self._activate(self.pre_activations(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Reconstructed rows, `[..., M]` to `[..., D]`.

        Raises:
            ConfigError: the SAE normalises each row, so that a code alone does not say which row it stands for.
        """
        if self.normalize != "none":
            raise ConfigError(f"this SAE normalises rows ({self.normalize}): use `reconstruct`, which undoes it")
        return self._decode(z)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """What encoding and decoding make of rows, `[..., D]`."""
        return self.encode_and_reconstruct(x)[1]

    def encode_and_reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations `[..., M]` and reconstructed rows `[..., D]`."""
        normalized, shift, scale = self._normalized(x)
        z = self._activate(self._pre(normalized))
        made = self._decode(z)
        return z, made if self.normalize == "none" else made * scale + shift

    def features(self, x: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        """Activations of some latents from their own encoder columns, `[..., D]` to `[..., len(indices)]`.

        Raises:
            ConfigError: no such latent, or latents of this SAE cannot be computed one by one (see `elementwise`).
        """
        if not self.elementwise:
            raise ConfigError(
                "single latents cannot be computed: "
                + ("the SAE is topk" if self.architecture == "topk" else f"rows are normalised ({self.normalize})"),
                fix="use a jumprelu or standard SAE without normalisation; BatchTopK is saved as jumprelu",
            )
        if wrong := [i for i in indices if not 0 <= i < self.latents]:
            raise ConfigError(f"there is no latent {wrong[0]}: the SAE has {self.latents}, numbered from 0")
        at = list(indices)
        chosen = replace(
            self,
            W_enc=self.W_enc[:, at],
            W_dec=self.W_dec[at],
            b_enc=self.b_enc[at],
            threshold=None if self.threshold is None else self.threshold[at],
        )
        return chosen.encode(x)

    def scaled(self, factor: float) -> SAE:
        """The SAE of rows `x` whose dictionary was trained on `factor * x`: the same latents fire, with the same
        activations (SAELens' `fold_activation_norm_scaling_factor`)."""
        return replace(self, W_enc=self.W_enc * factor, W_dec=self.W_dec / factor, b_dec=self.b_dec / factor)

    def unit_norm(self) -> SAE:
        """The same reconstructions with decoder rows of norm 1: an activation is then the length of what its latent
        adds to the residual (SAELens' `fold_W_dec_norm`).

        Raises:
            ConfigError: a topk SAE that chooses by unscaled activations; folding would change which are chosen.
        """
        if self.architecture == "topk" and not self.rescale_by_decoder_norm:
            if bool(((self.decoder_norms - 1).abs() < 1e-5).all()):
                return self
            raise ConfigError("folding decoder norms would change which latents of this topk SAE are active")
        norms = self.decoder_norms
        return replace(
            self,
            W_enc=self.W_enc * norms,
            W_dec=self.W_dec / norms[:, None],
            b_enc=self.b_enc * norms,
            threshold=None if self.threshold is None else self.threshold * norms,
            rescale_by_decoder_norm=False,
        )

    def with_metadata(self, **more: Any) -> SAE:
        """A copy with further metadata."""
        return replace(self, metadata={**self.metadata, **more})

    def _pre(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc

    def _activate(self, pre: torch.Tensor) -> torch.Tensor:
        import torch

        if self.architecture == "topk":
            assert self.k is not None
            pre = pre * self.decoder_norms if self.rescale_by_decoder_norm else pre
            largest = torch.topk(pre, self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, largest.indices, largest.values.relu())
        z = pre.relu()
        return z if self.threshold is None else z * (pre > self.threshold)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        z = z * (1 / self.decoder_norms) if self.rescale_by_decoder_norm else z
        return z @ self.W_dec + self.b_dec

    def _normalized(self, x: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
        """The row that is encoded, and what turns a reconstruction of it into one of `x`: shift and scale."""
        x = x.to(self.W_enc.dtype)
        if x.shape[-1] != self.width:
            raise ConfigError(f"the SAE reads rows of width {self.width}, and these have {x.shape[-1]}")
        if self.normalize == "layer_norm":
            shift = x.mean(dim=-1, keepdim=True)
            scale = (x - shift).std(dim=-1, keepdim=True)
            return (x - shift) / (scale + _LAYER_NORM_EPS), shift, scale
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.width**0.5
            return x / scale, 0.0, scale
        return x, 0.0, 1.0
