"""The tuned lens (Belrose et al. 2303.08112): one affine map a layer, into the basis that the unembedding reads.

    logits = unembed(norm(x W + b))

A map is fitted in two steps. Least squares to the last layer's rows, in relative errors, because the final norm leaves
nothing of a row's length; then Adam on the KL divergence from the model's own prediction, which is what the
paper trains. Of identity, least squares with several penalties and every tenth step of the descent the one with the
least KL on rows that none was fitted to is taken: an early layer of few rows is better left alone than fitted badly.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_probe.errors import ConfigError
from sglang_probe.eviction.likelihood import Unembedding
from sglang_probe.run import journal

FILE, MANIFEST = "translators.safetensors", "tuned_lens.json"
FORMAT = 1
PENALTIES = (1e-6, 1e-3, 1e-1, 1.0)
"""Of least squares, in units of the rows' mean variance."""
BATCH = 64
_LEARNING_RATE = 3e-4
_EVERY = 10
_BLOCK = 128


@dataclass(frozen=True)
class Translator:
    """An affine map of rows, `x W + b`."""

    weight_DD: Tensor
    bias_D: Tensor
    how: str
    """`identity`, `least squares` or `descent`."""

    @classmethod
    def identity(cls, width: int) -> Translator:
        """The plain lens."""
        return cls(torch.eye(width), torch.zeros(width), "identity")

    def __call__(self, rows_ND: Tensor) -> Tensor:
        return rows_ND.float() @ self.weight_DD + self.bias_D


@dataclass(frozen=True)
class TunedLens:
    """Translators by layer (-1: of the embedding)."""

    translators: Mapping[int, Translator]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What they were fitted to, and how well: model and its hashes, run, families by use, numbers by layer."""

    def write(self, folder: Path) -> None:
        """Write `translators.safetensors` and `tuned_lens.json`."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for layer, t in self.translators.items():
            tensors |= {f"{layer}.weight": t.weight_DD.contiguous(), f"{layer}.bias": t.bias_D.contiguous()}
        folder.mkdir(parents=True, exist_ok=True)
        journal.write_durably(folder / FILE, lambda path: save_file(tensors, path))
        how = {str(layer): t.how for layer, t in self.translators.items()}
        told = {"format": FORMAT, **self.manifest, "how": how, "translators_sha256": journal.sha256(folder / FILE)}
        journal.write_text_durably(folder / MANIFEST, json.dumps(told, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path, *, width: int, weights_sha256: Mapping[str, str] | None) -> TunedLens:
        """Read a tuned lens for rows of a model.

        Args:
            weights_sha256: of the files of the model that made the rows; None: not known.

        Raises:
            ConfigError: there is none, it is damaged, or it is of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / MANIFEST
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(folder / FILE)
            digest = journal.sha256(folder / FILE)
        except (OSError, ValueError, SafetensorError) as e:
            raise ConfigError(f"{folder} holds no tuned lens: {e}", fix="train one: `sglang-probe tune-lens`") from e
        if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("translators_sha256") != digest:
            raise ConfigError(f"{path} does not belong to the translators beside it", fix="train the lens again")
        theirs = (told.get("model") or {}).get("weights_sha256")
        if theirs and weights_sha256 and theirs != weights_sha256:
            raise ConfigError(
                f"the tuned lens of {folder} was trained on rows of `{told['model'].get('name')}` with other weights",
                fix="train one on rows of this model",
            )
        found = {}
        for layer, how in told["how"].items():
            weight, bias = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.bias")
            if weight is None or bias is None or weight.shape != (width, width) or bias.shape != (width,):
                raise ConfigError(f"{folder / FILE} has no translator of layer {layer} for rows of width {width}")
            found[int(layer)] = Translator(weight, bias, how)
        return cls(found, told)


def least_squares(x_ND: Tensor, final_ND: Tensor, penalty: float, eps: float) -> Translator:
    """The map from rows to the last layer's, each error weighed by one over the mean square of the last layer's row:
    the final norm takes its length away. Ridge regression in float64.

    Args:
        penalty: of the squared weights, in units of the rows' mean variance.
        eps: of the final norm.
    """
    x, y = x_ND.double(), final_ND.double()
    weight_N1 = 1 / (y.square().mean(-1, keepdim=True) + eps)
    weight_N1 = weight_N1 / weight_N1.sum()
    mean_x, mean_y = (weight_N1 * x).sum(0), (weight_N1 * y).sum(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ (weight_N1 * x)
    gram += torch.eye(len(gram)) * (penalty * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, x.T @ (weight_N1 * y))
    return Translator(weight.float(), (mean_y - mean_x @ weight).float(), "least squares")


def mean_kl(rows_ND: Tensor, final_log_NV: Tensor, translator: Translator, head: Unembedding) -> Tensor:
    """`KL(final || lens)` of each row, nats `[N]`."""
    found = []
    for x, final in zip(torch.split(rows_ND, _BLOCK), torch.split(final_log_NV, _BLOCK), strict=True):
        said = torch.log_softmax(head.logits(translator(x)), -1)
        found.append((final.exp() * (final - said)).sum(-1).clamp(min=0))
    return torch.cat(found)


def log_probabilities(rows_ND: Tensor, head: Unembedding) -> Tensor:
    """The model's own prediction from the last layer's rows, `[N, V]`."""
    return torch.cat([torch.log_softmax(head.logits(x), -1) for x in torch.split(rows_ND, _BLOCK)])


def fit(
    x_ND: Tensor,
    final_ND: Tensor,
    judge_x_ND: Tensor,
    judge_log_NV: Tensor,
    head: Unembedding,
    *,
    steps: int,
    seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> Translator:
    """Fit the translator of a layer.

    Args:
        x_ND, final_ND: rows of the layer and of the last one, to fit to.
        judge_x_ND, judge_log_NV: rows of other texts, and the model's predictions there, to choose by.
        steps: of the descent; 0: none.
    """
    with torch.no_grad():
        tried = [Translator.identity(x_ND.shape[1])]
        tried += [least_squares(x_ND, final_ND, p, head.eps) for p in penalties]
        scores = [float(mean_kl(judge_x_ND, judge_log_NV, t, head).mean()) for t in tried]
    best = min(range(len(tried)), key=lambda i: scores[i])
    found, least = tried[best], scores[best]
    weight, bias = found.weight_DD.clone().requires_grad_(), found.bias_D.clone().requires_grad_()
    # The step is in units of the weights, whose size depends on the rows' norm.
    rate = _LEARNING_RATE * float(found.weight_DD.square().mean().sqrt()) * x_ND.shape[1] ** 0.5
    optimizer = torch.optim.Adam(
        [{"params": [weight], "lr": rate}, {"params": [bias], "lr": rate * float(x_ND.float().square().mean().sqrt())}]
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        at = torch.randint(len(x_ND), (min(BATCH, len(x_ND)),), generator=generator)
        with torch.no_grad():
            final = torch.log_softmax(head.logits(final_ND[at]), -1)
        said = torch.log_softmax(head.logits(x_ND[at].float() @ weight + bias), -1)
        loss = (final.exp() * (final - said)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % _EVERY == 0 or step == steps:
            with torch.no_grad():
                now = Translator(weight.detach().clone(), bias.detach().clone(), "descent")
                score = float(mean_kl(judge_x_ND, judge_log_NV, now, head).mean())
            if score < least:
                found, least = now, score
    return found
