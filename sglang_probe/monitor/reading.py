"""What a monitor reads of a row of the residual stream: numbers, the same offline and in a server that serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

LOG_NORM, ERROR_RATIO, L0 = "log norm", "error ratio", "L0"
_AT_ONCE = 4096


class Reading:
    """The columns that are read of rows of one hook point.

    `log norm`; of an SAE `error ratio` (squared error of its reconstruction over the squared norm), `L0` (active
    latents) and `feature N` (activation of a latent that was named); of each vector `x @ w` under its name.

    Args:
        sae: of the hook point. features: latents of it. vectors: float32 `[D]` by name.

    Raises:
        ConfigError: features without an SAE, one that it does not have, or a vector with the name of another column.
    """

    def __init__(
        self,
        *,
        sae: SAE | None = None,
        features: Sequence[int] = (),
        vectors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        if features and sae is None:
            raise ConfigError("`--feature` needs `--sae`: whose features they are")
        if sae is not None and (beyond := [i for i in features if not 0 <= i < sae.latents]):
            raise ConfigError(f"there is no latent {beyond[0]}: the SAE has {sae.latents}, numbered from 0")
        self._sae, self._features, self._vectors = sae, list(features), dict(vectors or {})
        ours = [LOG_NORM, *([ERROR_RATIO, L0] if sae is not None else []), *(f"feature {i}" for i in features)]
        if taken := sorted(set(ours) & set(self._vectors)):
            raise ConfigError(f"a vector is called `{taken[0]}`, which is a column of every monitor")
        self.names: tuple[str, ...] = (*ours, *self._vectors)

    def columns(self, x_ND: torch.Tensor) -> Array:
        """The numbers of rows, float64 `[N, K]` in the order of `names`. A row that is not finite has NaN."""
        import torch

        parts = []
        for part in x_ND.split(_AT_ONCE):  # type: ignore[no-untyped-call]
            rows = part.float()
            norm2 = rows.square().sum(1).clamp_min(1e-30)
            columns = [norm2.log() / 2]
            if self._sae is not None:
                z, made = self._sae.encode_and_reconstruct(rows)
                error = (rows - made).square().sum(1)
                columns += [error / norm2, (z > 0).sum(1).float(), *(z[:, i] for i in self._features)]
            columns += [(rows * w).sum(1) for w in self._vectors.values()]
            parts.append(torch.stack(columns, dim=1))
        found = torch.cat(parts).numpy().astype(np.float64) if parts else np.empty((0, len(self.names)))
        return np.where(np.isfinite(found), found, np.nan)
