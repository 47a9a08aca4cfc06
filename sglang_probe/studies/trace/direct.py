"""Direct logit attribution from recorded rows: what each feature writes straight to the logits. No model is run.

With the last layer's row `y` of a position and the final norm's gain, a part `v` of the stream after some layer
reaches a logit directly as `(v * gain / rms(y)) @ W_U[token]`: the norm's scale is held fixed. That leaves out whatever
later layers read of it. After the last layer nothing is left out, and the parts sum to the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.run.hook_points import RESID_POST
from sglang_probe.run.schema import OVERSHOOT
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.study import token_of
from sglang_probe.studies.trace.setup import Reader, Setup, prepare


@dataclass(frozen=True)
class DirectResult(Measured):
    """What is written straight to the logits at one position."""

    run: str
    model: str
    rid: str
    position: int
    tokens: Sequence[str]
    """Around the position."""
    target: str
    foil: str
    metric: float
    """Logit of the target minus that of the foil, from the last layer's row."""
    layers: pd.DataFrame
    """A row for each SAE: `layer`, `sae`, `weights`, `features`, `error`, `bias` (sums), `all`, `last` (whether it is
    the model's last layer, where `all` is the metric)."""
    parts: pd.DataFrame
    """`layer`, `kind`, `latent`, `activation`, `direct`, `label`; the largest first."""
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "method": "direct logit attribution",
            "run": self.run,
            "model": self.model,
            "rid": self.rid,
            "position": self.position,
            "target": self.target,
            "foil": self.foil,
            "metric": self.metric,
            "layers": self.layers.to_dict("records"),
            "parts": self.parts.head(50).to_dict("records"),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table."""
        return {"parts": self.parts, "layers": self.layers}


def direct(
    path: Path,
    saes: Sequence[Path],
    *,
    rid: str | None = None,
    position: int | None = None,
    target: str | None = None,
    foil: str | None = None,
    **more: Any,
) -> DirectResult:
    """Attribute a prediction directly; arguments as of `trace`.

    Raises:
        ConfigError: the run lacks a row that is needed; no such request, position or token.
    """
    setup = prepare(path, saes, **more)
    rid = str(setup.run.requests()["rid"].iloc[0]) if rid is None else rid
    r = setup.recorded(rid)
    ids = [*map(int, r["prompt_ids"]), *map(int, r["output_ids"])]
    at = len(r["prompt_ids"]) - 1 if position is None else position
    if not 0 <= at < len(ids):
        raise ConfigError(f"`{rid}` has the positions 0 to {len(ids) - 1}, not {at}")
    last = int((setup.run.manifest.get("model_config") or {})["num_hidden_layers"]) - 1
    y = _row(setup, rid, at, f"blocks.{last}.{RESID_POST}")
    head = setup.head
    logits = head.logits(y[None])[0]
    if target is None and at + 1 >= len(ids):
        raise ConfigError(f"nothing was recorded after position {at} of `{rid}`", fix="name a --target")
    wanted = ids[at + 1] if target is None else token_of(target, setup.vocabulary)
    best = logits.topk(2).indices.tolist()
    other = token_of(foil, setup.vocabulary) if foil else int(best[1] if best[0] == wanted else best[0])
    if other == wanted:
        raise ConfigError(f"target and foil are the same token, `{setup.text(wanted)}`", fix="name another --foil")
    read = head.norm_M * (head.weight_VM[wanted] - head.weight_VM[other])
    read = read * (y.square().mean() + head.eps).rsqrt()
    layers, parts = [], []
    for reader in setup.readers:
        x = y if reader.layer == last else _row(setup, rid, at, reader.hook_point)
        z, error = reader.site.split(x)
        own = z * (reader.site.sae.W_dec @ read)
        active = z.nonzero().flatten()
        layers.append(_layer(reader, own, error @ read, reader.site.sae.b_dec @ read, last))
        frame = pd.DataFrame({"layer": reader.layer, "kind": "feature", "latent": active.numpy()})
        frame["activation"], frame["direct"] = z[active].numpy(), own[active].numpy()
        shown = frame.iloc[np.argsort(-frame["direct"].abs().to_numpy())[:30]]["latent"].tolist()
        frame["label"] = frame["latent"].map(reader.names(shown, setup.vocabulary, head)).fillna("")
        rest = {"layer": reader.layer, "kind": "error", "latent": -1, "activation": float(error.norm())}
        rest |= {"direct": float(error @ read), "label": "what the SAE does not explain"}
        parts += [frame, pd.DataFrame([rest])]
    found = pd.concat(parts, ignore_index=True)
    found = found.iloc[np.argsort(-found["direct"].abs().to_numpy(), kind="stable")].reset_index(drop=True)
    first = max(0, at - 11)
    return DirectResult(
        setup.run.path.name,
        setup.name,
        rid,
        at,
        [setup.text(t) for t in ids[first : at + 1]],
        setup.text(wanted),
        setup.text(other),
        float(logits[wanted] - logits[other]),
        pd.DataFrame(layers),
        found,
        _notes(layers),
    )


def _layer(reader: Reader, own: Any, error: Any, bias: Any, last: int) -> dict[str, Any]:
    return {
        "layer": reader.layer,
        "sae": reader.folder,
        "weights": reader.weights,
        "features": float(own.sum()),
        "error": float(error),
        "bias": float(bias),
        "all": float(own.sum() + error + bias),
        "last": reader.layer == last,
    }


def _notes(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [
        "Direct logit attribution: what is written straight to the logits. It says nothing of what later layers read, "
        "and nothing was ablated."
    ]
    if not all(row["last"] for row in layers):
        notes.append("After layers before the last the parts do not sum to the metric: later layers did the rest.")
    return notes


def _row(setup: Setup, rid: str, position: int, point: str) -> Any:
    """The run's row of a position, float32 `[D]`."""
    tokens = setup.run.tokens()
    mine = tokens[(tokens["rid"] == rid) & (tokens["position"] == position) & (tokens["phase"] != OVERSHOOT)]
    source = mine["source_row"].to_numpy()[-1:]
    if point not in setup.run.hook_points or not setup.run.holds(point, source).any():
        raise ConfigError(
            f"{setup.run.path} has no row of `{point}` at position {position} of `{rid}`",
            fix="harvest with this hook point, or trace without --direct",
        )
    return setup.run.rows(point, source)[0].float()
