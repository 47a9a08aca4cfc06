"""What the model predicts, offline: logits in float32 from captured rows of the last layer's residual stream.

The row of position `p` predicts the token at `p + 1`. So the tokens of an output of T tokens after a prompt of L are
predicted by the rows of positions `L - 1 ... L + T - 2`, of which the first is a prefill row: under the query-visible
protocol it comes from the full cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sglang_probe.attention.from_run import model_config
from sglang_probe.errors import ProbeError
from sglang_probe.run.hook_points import RESID_POST, REVIEWED_ARCHITECTURES
from sglang_probe.run.run import Run


@dataclass(frozen=True)
class Unembedding:
    """Final norm (RMSNorm) and unembedding of a model, in float32."""

    norm_M: Tensor
    eps: float
    weight_VM: Tensor

    def logits(self, rows_NM: Tensor) -> Tensor:
        """Logits `[N, V]` in float32 of rows of the residual stream after the last layer."""
        x = rows_NM.to(torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.norm_M
        return x @ self.weight_VM.T


def load_unembedding(model: Path) -> Unembedding:
    """Read final norm and unembedding of a model folder.

    Raises:
        ProbeError: another architecture than the reviewed ones (all have an RMSNorm and no bias), or no such weights.
    """
    import json

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or ["unknown"]
    if names[0] not in REVIEWED_ARCHITECTURES:
        raise ProbeError(f"the final norm of {names[0]} has not been reviewed", fix=", ".join(REVIEWED_ARCHITECTURES))
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return Unembedding(_weight(model, "model.norm.weight"), float(config["rms_norm_eps"]), _weight(model, head))


def output_logits(run: Run, rid: str, unembedding: Unembedding) -> Tensor:
    """Logits `[T, V]` that predict the T output tokens of a request.

    Raises:
        RunDirectoryError: no such request, or the residual stream after the last layer was not captured.
    """
    last = int(model_config(run)["num_hidden_layers"]) - 1
    r = run.requests().set_index("rid").loc[rid]
    first = int(r["prompt_len"]) - 1
    rows = run.activations(rid, f"blocks.{last}.{RESID_POST}")[first : first + int(r["output_len"])]
    return unembedding.logits(rows)


def token_nll(logits_TV: Tensor, tokens: Sequence[int]) -> Tensor:
    """Negative log-likelihood of each token in nats, `[T]`."""
    chosen = torch.as_tensor(list(tokens))[:, None]
    return -torch.log_softmax(logits_TV, -1).gather(-1, chosen)[:, 0]


def divergence_from(full_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Kullback-Leibler divergence `KL(full || other)` of two predictions of the same tokens, in nats, `[T]`."""
    p, q = torch.log_softmax(full_TV, -1), torch.log_softmax(other_TV, -1)
    return (p.exp() * (p - q)).sum(-1)


def _weight(model: Path, name: str) -> Tensor:
    from safetensors import safe_open

    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            if name in f.keys():  # noqa: SIM118 (not a mapping)
                weight: Tensor = f.get_tensor(name)
                return weight.to(torch.float32)
    raise ProbeError(f"{model} has no weight `{name}`", fix="give the folder of the run's model")
