"""Sparse autoencoders (SAEs) of captured rows: reading, recalibrating, judging and matching them.

    sae = read_sae("models/sae-probe-text/seed-0")
    z_NM = sae.encode(x_ND)                                  # sparse codes
    found = evaluate(sae, x_ND)                              # explained variance, L0, dead latents

Nothing here needs SGLang or SAELens; SAELens trains (`sglang_probe.sae.train`, the extra `[sae]`), and only there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_probe.lazy import lazily

if TYPE_CHECKING:
    from sglang_probe.sae.evaluation import Evaluation, Sinks, evaluate
    from sglang_probe.sae.folder import read_sae, write_sae
    from sglang_probe.sae.sae import SAE
    from sglang_probe.sae.threshold import recalibrated

__all__ = ["SAE", "Evaluation", "Sinks", "evaluate", "read_sae", "recalibrated", "write_sae"]

__getattr__ = lazily(
    __name__,
    {
        "SAE": "sae",
        "Evaluation": "evaluation",
        "Sinks": "evaluation",
        "evaluate": "evaluation",
        "read_sae": "folder",
        "recalibrated": "threshold",
        "write_sae": "folder",
    },
)
