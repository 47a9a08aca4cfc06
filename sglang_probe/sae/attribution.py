"""What a prediction used: attribution to the latents of SAEs, and to what they do not explain.

The metric is a weighted sum of the logits at a prompt's last position, e.g. that of a target minus that of a foil. The
residual stream after a layer is

    x_t = sum_i z_ti d_i + b + e_t

so that every row has a *feature* node for each latent that fires and an *error* node (Marks et al. 2403.19647). A
node's attribution is what the metric is expected to lose when the node is set to its baseline:

    feature   (z_ti - z0_i) d_i . G_t        error   (e_t - e0) . G_t

with G the gradient of the metric by the row: at the prompt itself (`GRADIENT`, attribution patching), or averaged along
the straight line on which all rows of the layer come from their baseline (`INTEGRATED`, integrated gradients,
Sundararajan et al. 1703.01365). The second sums, over the nodes of a layer, to the metric minus that of the baseline
(`completeness`); neither is what happens when one node is ablated, which `ablated` does.

Downstream of a layer the model is the model: other layers' SAEs read it, and change nothing.

Shapes: T positions, D width, M latents, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE

Array = np.ndarray[Any, Any]
Kind = Literal["feature", "error"]
Method = Literal["gradient", "integrated"]
FEATURE: Kind = "feature"
ERROR: Kind = "error"
GRADIENT: Method = "gradient"
INTEGRATED: Method = "integrated"
EMBEDDING = -1
"""Number of the "layer" before the first."""
STEPS = 10
"""Points of integrated gradients."""
_AT_ONCE = 1 << 11
"""Positions of one batch, over all copies of the prompt."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Site:
    """A layer whose residual stream is read by an SAE, and what its nodes are set to when they are ablated."""

    layer: int
    sae: SAE
    z0_M: Tensor
    """Activations."""
    e0_D: Tensor
    """Error."""

    @classmethod
    def of(cls, layer: int, sae: SAE, z0_M: Tensor | None = None, e0_D: Tensor | None = None) -> Site:
        """A site; by default the baseline is 0, as of `ablate_feature`.

        Raises:
            ConfigError: latents of this SAE have no decoder row of their own.
        """
        if sae.normalize != "none":
            raise ConfigError(f"an SAE that normalises rows ({sae.normalize}) has no nodes: latents have no fixed rows")
        sae = sae.unit_norm() if sae.rescale_by_decoder_norm else sae
        z0 = torch.zeros(sae.latents) if z0_M is None else z0_M
        return cls(layer, sae, z0, torch.zeros(sae.width) if e0_D is None else e0_D)

    @property
    def baseline_D(self) -> Tensor:
        """A row whose nodes are all at their baseline."""
        return self.z0_M @ self.sae.W_dec + self.sae.b_dec + self.e0_D

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations `[..., M]` and errors `[..., D]` of rows."""
        z = self.sae.encode(x)
        return z, x - (z @ self.sae.W_dec + self.sae.b_dec)


@dataclass(frozen=True, order=True)
class Node:
    """A latent at a position, or the error there."""

    layer: int
    position: int
    kind: Kind
    latent: int = -1
    """-1: of an error."""


@dataclass(frozen=True)
class Scored:
    """The nodes of one site."""

    site: Site
    traced_T: Tensor
    """bool; the others are left as they are, and have no nodes."""
    z_TM: Tensor
    error_TD: Tensor
    gradients: Mapping[Method, Tensor]
    """Of the metric by the row, `[T, D]`."""
    baseline: float | None
    """The metric with all traced rows of this layer at their baseline; None: not asked."""

    def features(self, method: Method) -> Tensor:
        """Attributions `[T, M]`; 0 of rows that are not traced."""
        found: Tensor = (self.z_TM - self.site.z0_M) * (self.gradients[method] @ self.site.sae.W_dec.T)
        return found * self.traced_T[:, None]

    def errors(self, method: Method) -> Tensor:
        """Attributions `[T]`; 0 of rows that are not traced."""
        return ((self.error_TD - self.site.e0_D) * self.gradients[method]).sum(-1) * self.traced_T

    def of(self, node: Node, method: Method) -> float:
        """Attribution of one node."""
        g = self.gradients[method][node.position]
        if node.kind == ERROR:
            return float((self.error_TD[node.position] - self.site.e0_D) @ g)
        away = self.z_TM[node.position, node.latent] - self.site.z0_M[node.latent]
        return float(away * (self.site.sae.W_dec[node.latent] @ g))

    def size(self, node: Node) -> float:
        """How far a node is from its baseline, in the length of a row."""
        if node.kind == ERROR:
            return float((self.error_TD[node.position] - self.site.e0_D).norm())  # type: ignore[no-untyped-call]
        away = self.z_TM[node.position, node.latent] - self.site.z0_M[node.latent]
        return float(away.abs() * self.site.sae.decoder_norms[node.latent])

    def nodes(self) -> list[Node]:
        """Every node that is not at its baseline."""
        away = (self.z_TM != self.site.z0_M) & self.traced_T[:, None]
        found = [Node(self.site.layer, int(t), FEATURE, int(m)) for t, m in away.nonzero().tolist()]
        return found + [Node(self.site.layer, int(t), ERROR) for t in self.traced_T.nonzero().flatten().tolist()]

    def completeness(self, metric: float) -> tuple[float, float]:
        """The sum of integrated gradients, and what it should be: the metric minus that of the baseline."""
        assert self.baseline is not None
        total = self.features(INTEGRATED).double().sum() + self.errors(INTEGRATED).double().sum()
        return float(total), metric - self.baseline

    def error_share(self, method: Method) -> float:
        """Absolute attribution of error nodes as a share of that of errors and features, those of a position summed
        first: many small features that cancel are not much."""
        errors = self.errors(method).abs().sum()
        features = self.features(method).sum(-1).abs().sum()
        return float(errors / (errors + features).clamp(min=1e-30))


class Prompt:
    """A prompt in a model, and the metric at its last position.

    Args:
        model: a causal model of `transformers` in float32 whose decoder layers are `model.model.layers`, on the CPU.
        ids: token ids up to the position whose prediction is traced.
        weights_V: of the logits in the metric.
        sites: by ascending layer.
        traced: by layer, which rows have nodes, bool `[T]`.
    """

    def __init__(
        self, model: Any, ids: Sequence[int], weights_V: Tensor, sites: Sequence[Site], traced: Mapping[int, Tensor]
    ) -> None:
        self._model, self._ids = model.requires_grad_(False), torch.tensor([list(ids)])
        self._weights = weights_V
        self.sites = {s.layer: s for s in sorted(sites, key=lambda s: s.layer)}
        self.traced = traced
        self._copies = max(1, _AT_ONCE // len(ids))
        seen: dict[int, Tensor] = {}
        with torch.no_grad(), hooked(model, {layer: _keeping(seen, layer) for layer in (EMBEDDING, *self.sites)}):
            self.logits_V = self._logits(1)[0]
        self.rows = {layer: x[0] for layer, x in seen.items()}
        """The residual stream after each layer, `[T, D]`."""
        self.metric = float(self.logits_V @ weights_V)

    def scored(self, *, steps: int = STEPS) -> dict[int, Scored]:
        """The nodes of every site.

        Args:
            steps: points of integrated gradients; 0: gradients alone.
        """
        gradients = self.gradients([self._weights])[0]
        out = {}
        for layer, site in self.sites.items():
            with torch.no_grad():
                z, error = site.split(self.rows[layer])
            found: dict[Method, Tensor] = {GRADIENT: gradients[layer]}
            baseline = None
            if steps:
                start = torch.where(self.traced[layer][:, None], site.baseline_D, self.rows[layer])
                found[INTEGRATED] = self.path_gradient(layer, start, steps)
                baseline = float(self.with_rows(layer, start[None])[0])
            out[layer] = Scored(site, self.traced[layer], z, error, found, baseline)
        return out

    def gradients(self, weights: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        """Gradients of some metrics, each given by its weights `[V]`, by the rows of every site, `[T, D]`."""
        if not self.sites:
            return [{} for _ in weights]
        first = next(iter(self.sites))
        kept: dict[int, Tensor] = {}

        def begin(x: Tensor) -> Tensor:
            kept[first] = x.detach().requires_grad_()
            return kept[first]

        changes = {layer: _keeping(kept, layer, detach=False) for layer in self.sites} | {first: begin}
        with hooked(self._model, changes):
            logits = self._logits(1)[0]
        rows = [kept[layer] for layer in self.sites]
        found = [torch.autograd.grad(logits @ w, rows, retain_graph=True) for w in weights]
        return [{layer: g[0] for layer, g in zip(self.sites, of, strict=True)} for of in found]

    def path_gradient(self, layer: int, start_TD: Tensor, steps: int) -> Tensor:
        """Mean gradient of the metric by the rows of a layer on the line from `start_TD` to what they are, `[T, D]`;
        by Gauss and Legendre's rule, which is exact for polynomials up to degree `2 steps - 1`."""
        at, weight = np.polynomial.legendre.leggauss(steps)
        alpha, share = torch.tensor((at + 1) / 2).float(), torch.tensor(weight / 2).float()
        total = torch.zeros_like(start_TD)
        for some in range(0, steps, self._copies):
            a, w = alpha[some : some + self._copies], share[some : some + self._copies]
            leaf = (start_TD + a[:, None, None] * (self.rows[layer] - start_TD)).requires_grad_()
            gradient = torch.autograd.grad(self._with(layer, leaf).sum(), leaf)[0]
            total += (w[:, None, None] * gradient).sum(0)
        return total

    def with_rows(self, layer: int, rows_STD: Tensor) -> Tensor:
        """The metric with rows of a layer replaced, `[S]`."""
        with torch.no_grad():
            return torch.cat([self._with(layer, part) for part in torch.split(rows_STD, self._copies)])

    def ablated(self, sets: Sequence[Sequence[Node]]) -> Array:
        """The metric with each of some sets of nodes at its baseline, float64 `[S]`: the model computed again, each
        set in a copy of the prompt. Nodes of later layers are what they have become by then."""
        found = []
        with torch.no_grad():
            for at in range(0, len(sets), self._copies):
                some = sets[at : at + self._copies]
                layers = sorted({n.layer for s in some for n in s})
                with hooked(self._model, {layer: self._ablating(layer, some) for layer in layers}):
                    found.append(self._logits(len(some)) @ self._weights)
        return torch.cat(found).double().numpy() if found else np.empty(0)

    def edges(self, earlier: int, later: Scored, nodes: Sequence[Node], method: Method) -> list[Tensor]:
        """By node of a later layer: the gradient of its attribution by the rows of an earlier one, `[T, D]`. What an
        earlier node sends to it is its distance from the baseline times that (`share_of`)."""
        assert earlier < later.site.layer
        leaf: dict[int, Tensor] = {}
        caught: dict[int, Tensor] = {}

        def begin(x: Tensor) -> Tensor:
            leaf[0] = x.detach().requires_grad_()
            return leaf[0]

        with hooked(self._model, {earlier: begin, later.site.layer: _keeping(caught, 0, detach=False)}):
            self._logits(1)
        z, error = later.site.split(caught[0][0])
        out = []
        for n in nodes:
            g = later.gradients[method][n.position]
            own = error[n.position] if n.kind == ERROR else z[n.position, n.latent] * later.site.sae.W_dec[n.latent]
            out.append(torch.autograd.grad(own @ g, leaf[0], retain_graph=True)[0][0])
        return out

    def _with(self, layer: int, rows_BTD: Tensor) -> Tensor:
        with hooked(self._model, {layer: lambda x: rows_BTD}):
            return self._logits(len(rows_BTD)) @ self._weights

    def _ablating(self, layer: int, sets: Sequence[Sequence[Node]]) -> Change:
        site = self.sites[layer]
        at: dict[tuple[int, int], list[Node]] = {}
        for copy, nodes in enumerate(sets):
            for n in nodes:
                if n.layer == layer:
                    at.setdefault((copy, n.position), []).append(n)
        copies, positions = (torch.tensor([k[i] for k in at], dtype=torch.long) for i in (0, 1))
        latents = torch.zeros(len(at), site.sae.latents)
        errors = torch.zeros(len(at), 1)
        for r, nodes in enumerate(at.values()):
            latents[r, [n.latent for n in nodes if n.kind == FEATURE]] = 1
            errors[r] = any(n.kind == ERROR for n in nodes)

        def change(x: Tensor) -> Tensor:
            out = x.clone()
            z, e = site.split(x[copies, positions])
            out[copies, positions] -= ((z - site.z0_M) * latents) @ site.sae.W_dec + (e - site.e0_D) * errors
            return out

        return change

    def _logits(self, copies: int) -> Tensor:
        """Of the last position, `[copies, V]`."""
        said = self._model(self._ids.expand(copies, -1), use_cache=False, logits_to_keep=1)
        logits: Tensor = said.logits[:, -1].float()
        return logits


def share_of(scored: Scored, gradient_TD: Tensor) -> Scored:
    """The nodes of an earlier site as parts of a later node's attribution, by the gradient that `edges` gives."""
    return replace(scored, gradients={GRADIENT: gradient_TD, INTEGRATED: gradient_TD}, baseline=None)


@contextmanager
def hooked(model: Any, changes: Mapping[int, Change]) -> Iterator[None]:
    """While this is open, the residual stream `[B, T, D]` after each layer is what its function makes of it;
    `EMBEDDING` is that before the first."""
    handles = []
    try:
        for layer, change in changes.items():
            module = model.model.embed_tokens if layer == EMBEDDING else model.model.layers[layer]

            def run(_module: Any, _args: Any, output: Any, change: Change = change) -> Any:
                if isinstance(output, tuple):
                    return (change(output[0]), *output[1:])
                return change(output)

            handles.append(module.register_forward_hook(run))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeping(into: dict[int, Tensor], layer: int, *, detach: bool = True) -> Change:
    def keep(x: Tensor) -> Tensor:
        into[layer] = x.detach() if detach else x
        return x

    return keep
