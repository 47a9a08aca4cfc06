"""From a dictionary to one feature and its value, and from two sets of replies to a direction and its cap, by what they
do to selection texts.

Selection and confirmation share no split object. Everything is chosen on the first; the second is looked at once, for
the frontier of arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from causal import Arm, Net, Texts, by_object, divergence, odds
from dialogues import HEADER, IDS, REFUSED, SPLIT, Dialogue

from sglang_probe.sae.differential import difference, permutation_p
from sglang_probe.sae.folder import read_sae
from sglang_probe.stats.multiple import benjamini_hochberg
from sglang_probe.steering.apply import Parts, parts_of
from sglang_probe.steering.make import read_sae_feature

Q = 0.05
SELECTION, HELD_OUT = SPLIT[:6], SPLIT[6:]
LAYERS_TRIED = (0, 1)
MULTIPLES = (0.0, -0.5, -1.0, -1.5, -2.0, -3.0)
"""Values that a feature is clamped to, in its mean activation where it fires in selection replies."""
CAPS = (0.75, 0.5, 0.25, 0.0)
"""Where a direction is capped: on the way from the mean projection of refusals that end to that of those that go on."""
STOPS = -2.0
"""Log-odds of going on under which a reply surely ends: 7 to 1."""


def point(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


class Chooser:
    """The model, the dictionaries, and the texts of both halves.

    Args:
        saes: folder of the dictionary of each layer.
        drawn: the captured dialogues.
    """

    def __init__(self, net: Net, saes: Mapping[int, Path], drawn: Sequence[Dialogue]) -> None:
        self.net, self.folders = net, saes
        self.saes = {layer: read_sae(folder, hook_point=point(layer)) for layer, folder in saes.items()}

        def texts(things: Sequence[str]) -> Texts:
            return Texts.of(
                [d for d in drawn if d.kind in ("split", "refused") and d.object in things], header_only=True
            )

        self.split = {"selection": texts(SELECTION), "held out": texts(HELD_OUT)}
        self.refused = texts(REFUSED)
        self.out_of_scope = {k: Texts.of([d for d in drawn if d.kind == k]) for k in ("content", "story")}
        self.plain = {k: net.logp(t) for k, t in self.out_of_scope.items()}
        self.before = {k: odds(net.logp(t)) for k, t in self.split.items()}

    def pairs(self) -> tuple[Texts, Texts]:
        """Selection texts, and as many that are the same but for the object, whose refusal ends the reply."""
        split = self.split["selection"]
        twins = split.ids_BT.clone()
        twins[:, split.prompt_len - 2] = torch.tensor([IDS[REFUSED[i % len(REFUSED)]] for i in range(len(twins))])
        return split, Texts(twins, split.prompt_len, split.objects)

    def rows(self, texts: Texts, layer: int) -> torch.Tensor:
        """Residuals of the header, `[B, 7, D]`."""
        self.net.logp(texts)
        return self.net.rows_LBTD[layer][:, texts.prompt_len :]

    def parts(self, layer: int, index: int) -> Parts:
        return parts_of(read_sae_feature(self.folders[layer], index, hook_point=point(layer)).tensors)

    def effect(self, arm: Arm, half: str = "selection") -> dict[str, float]:
        """Of an arm on split texts, objects as units: mean log-odds of going on that it takes, share of texts that
        stop, and the largest log-odds that is left."""
        texts = self.split[half]
        after = odds(self.net.logp(texts, arm))
        return {
            "lost": float(by_object(self.before[half] - after, texts.objects).mean()),
            "stops": float(by_object((after < 0).astype(float), texts.objects).mean()),
            "highest": float(after.max()),
        }

    def side_effects(self, arm: Arm) -> dict[str, float]:
        """KL of replies that are not about forbidden objects, nats a token."""
        return {f"kl_{k}": divergence(self.net, t, self.plain[k], arm) for k, t in self.out_of_scope.items()}

    def discoveries(self, layer: int) -> dict[str, Any]:
        """Which latents tell replies about selection objects from other refusals, on the header's rows; objects are the
        units."""
        sae = self.saes[layer]
        values = []
        for texts in (self.split["selection"], self.refused):
            z = sae.encode(self.rows(texts, layer).flatten(0, 1)).view(len(texts.objects), len(HEADER), -1)
            mean = z.mean(1).double().numpy()
            values.append(np.stack([by_object(mean[:, i], texts.objects) for i in range(mean.shape[1])], axis=1))
        x, g = np.concatenate(values), np.repeat([1, 0], [len(v) for v in values])
        alive = np.flatnonzero((x > 0).any(0))
        q = benjamini_hochberg(permutation_p(x[:, alive], g, seed=1))
        gap = difference(x[:, alive], g)
        tell = [int(i) for i, ok in zip(alive, (q <= Q) & (gap > 0), strict=True) if ok]
        return {
            "layer": layer,
            "alive": [int(i) for i in alive],
            "discovered": tell,
            "difference": {int(i): float(d) for i, d in zip(alive, gap, strict=True)},
            "activity": {int(i): float(a) for i, a in zip(alive, x[:, alive][g == 1].mean(0), strict=True)},
        }

    def choose(self) -> dict[str, Any]:
        """The discovery whose ablation takes most of the log-odds from selection texts; the value nearest to zero at
        which all of them stop; and as a control the latent of that layer that is most nearly as active."""
        found = [self.discoveries(layer) for layer in LAYERS_TRIED]
        ablated = [
            {
                "layer": f["layer"],
                "feature": i,
                "difference": f["difference"][i],
                **self.effect(self.ablation(f["layer"], [i])),
            }
            for f in found
            for i in f["discovered"]
        ]
        ablated.sort(key=lambda r: -r["lost"])
        best = ablated[0]
        layer, index = best["layer"], best["feature"]
        here = next(f for f in found if f["layer"] == layer)
        z = self.saes[layer].encode(self.rows(self.split["selection"], layer).flatten(0, 1))[:, index]
        unit = float(z[z > 0].mean())
        values = []
        for multiple in MULTIPLES:
            arm = self.clamp(layer, index, multiple * unit)
            values.append(
                {"multiple": multiple, "value": multiple * unit, **self.effect(arm), **self.side_effects(arm)}
            )
        enough = [v for v in values if v["highest"] <= STOPS]
        chosen = enough[0] if enough else max(values, key=lambda v: v["lost"])
        others = [i for i in here["alive"] if i != index and here["activity"][i] > 0]
        control = min(others, key=lambda i: abs(np.log(here["activity"][i] / here["activity"][index])))
        return {
            "layer": layer,
            "feature": index,
            "control": control,
            "value": chosen["value"],
            "multiple": chosen["multiple"],
            "enough": bool(enough),
            "mean_activation": unit,
            "by_difference": max((r for r in ablated if r["layer"] == layer), key=lambda r: r["difference"])["feature"],
            "dictionaries": [
                {k: len(f[k]) if isinstance(f[k], list) else f[k] for k in ("layer", "alive", "discovered")}
                for f in found
            ],
            "ablated": ablated[:8],
            "values": values,
        }

    def ablation(self, layer: int, indices: Sequence[int]) -> Arm:
        return Arm.of(layer, "ablate_feature", 1.0, *(self.parts(layer, i) for i in indices))

    def clamp(self, layer: int, index: int, value: float) -> Arm:
        """As a server's clamp does it: where the feature is active."""
        return Arm.of(layer, "clamp", value, self.parts(layer, index), gated=True)

    def contrast(self, layer: int) -> dict[str, Any]:
        """The contrastive direction of the header's last row, from refusals that end to those that go on, selection
        objects alone; the mean projections of both on it; and its cap, the mildest under which every selection text
        stops."""
        on, off = (self.rows(t, layer)[:, -1].double() for t in (self.split["selection"], self.refused))
        towards = on.mean(0) - off.mean(0)
        unit = towards / towards.norm()
        low, high = (float((x @ unit).mean()) for x in (off, on))
        tried = []
        for t in CAPS:
            value = low + t * (high - low)
            arm = Arm.of(layer, "cap", value, Parts(towards.float()))
            tried.append({"dose": t, "value": value, **self.effect(arm), **self.side_effects(arm)})
        enough = [c for c in tried if c["highest"] <= STOPS]
        cap = enough[0] if enough else max(tried, key=lambda c: c["lost"])
        return {
            "direction": towards.tolist(),
            "projections": [low, high],
            "caps": tried,
            "cap": {**cap, "enough": bool(enough)},
        }

    def frontier(self, chosen: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Arms at doses: effect on held-out objects beside side effects on what is out of scope, without any gate of
        intent."""
        layer, unit = chosen["layer"], chosen["mean_activation"]
        v, (low, high) = Parts(torch.tensor(chosen["direction"])), chosen["projections"]
        together = [r["feature"] for r in chosen["ablated"] if r["layer"] == layer]
        w = Parts(self.parts(layer, chosen["feature"]).vector)
        arms: list[tuple[str, float, Arm]] = [
            *(("feature clamped", m, self.clamp(layer, chosen["feature"], m * unit)) for m in MULTIPLES),
            *(("control clamped", m, self.clamp(layer, chosen["control"], m * unit)) for m in MULTIPLES),
            *(("best ablated together", n, self.ablation(layer, together[:n])) for n in (2, 3) if n <= len(together)),
            ("feature's direction projected out", 1.0, Arm.of(layer, "project_out", 1.0, w)),
            *(("contrast capped", t, Arm.of(layer, "cap", low + t * (high - low), v)) for t in CAPS),
            *(("contrast subtracted", t, Arm.of(layer, "add", -t * (high - low), v)) for t in (0.25, 0.5, 1.0)),
            ("contrast projected out", 1.0, Arm.of(layer, "project_out", 1.0, v)),
        ]
        return [
            {"arm": name, "dose": dose, **self.effect(arm, "held out"), **self.side_effects(arm)}
            for name, dose, arm in arms
        ]
