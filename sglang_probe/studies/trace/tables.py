"""The tables of a trace: nodes, positions, edges, layers, and what a reader should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from sglang_probe.sae.attribution import EMBEDDING, ERROR, GRADIENT, INTEGRATED, Method, Node, Prompt, Scored, share_of
from sglang_probe.studies.trace.setup import Setup
from sglang_probe.verify.reference import tolerance

TOKEN = "token"
"""Kind of the nodes of the embedding: whole rows."""
OUTPUT = "output"
MOST_GAP = 0.05
"""Of integrated gradients: a larger part of the sum missing is told."""
_EDGES = 80


def name_of(node: Node) -> str:
    """As tables have it: layer, latent or error, position."""
    what = "error" if node.kind == ERROR else f"f{node.latent}"
    return f"L{node.layer} {what} @{node.position}"


def edges(prompt: Prompt, scored: Mapping[int, Scored], shown: Sequence[Node], method: Method) -> pd.DataFrame:
    """Edges between shown nodes of layers that follow each other, from tokens, and to the output."""
    found: list[tuple[str, str, int, int, float]] = []
    layers = [EMBEDDING, *scored]
    for earlier, layer in pairwise(layers):
        mine = [n for n in shown if n.layer == layer]
        above = [n for n in shown if n.layer == earlier]
        if not mine:
            continue
        for n, gradient in zip(mine, prompt.edges(earlier, scored[layer], mine, method), strict=True):
            if earlier == EMBEDDING:
                sent = (prompt.rows[EMBEDDING] * gradient).sum(-1).tolist()
                found += [(f"token @{t}", name_of(n), earlier, layer, v) for t, v in enumerate(sent)]
            else:
                part = share_of(scored[earlier], gradient)
                found += [(name_of(u), name_of(n), earlier, layer, part.of(u, method)) for u in above]
    strongest = sorted(found, key=lambda e: -abs(e[4]))[:_EDGES]
    last = [n for n in shown if n.layer == layers[-1]]
    strongest += [(name_of(n), OUTPUT, n.layer, n.layer + 1, scored[n.layer].of(n, method)) for n in last]
    return pd.DataFrame(strongest, columns=["source", "target", "from_layer", "to_layer", "value"])


def node_table(
    setup: Setup,
    prompt: Prompt,
    scored: Mapping[int, Scored],
    method: Method,
    ids: Sequence[int],
    shown: Sequence[Node],
) -> pd.DataFrame:
    top = set(shown)
    frames = []
    for layer, s in scored.items():
        features, errors = s.features(GRADIENT), s.errors(GRADIENT)
        t, m = features.nonzero().T.numpy()
        long = s.features(INTEGRATED) if INTEGRATED in s.gradients else None
        frame = pd.DataFrame({"layer": layer, "position": t, "kind": "feature", "latent": m})
        frame["activation"] = s.z_TM[t, m].numpy()
        frame[GRADIENT] = features[t, m].numpy()
        frame[INTEGRATED] = float("nan") if long is None else long[t, m].numpy()
        at = s.traced_T.nonzero().flatten().numpy()
        error = pd.DataFrame({"layer": layer, "position": at, "kind": ERROR, "latent": -1})
        error["activation"] = s.error_TD.norm(dim=1)[at].numpy()
        error[GRADIENT] = errors[at].numpy()
        error[INTEGRATED] = float("nan") if long is None else s.errors(INTEGRATED)[at].numpy()
        frames += [frame, error]
    nodes = pd.concat(frames, ignore_index=True)
    made = [Node(r.layer, r.position, r.kind, r.latent) for r in nodes.itertuples()]
    nodes.insert(0, "node", [name_of(n) for n in made])
    nodes.insert(3, "token", [setup.text(ids[p]) for p in nodes["position"]])
    nodes["top"] = [n in top for n in made]
    label: dict[Node, str] = {}
    for reader in setup.readers:
        mine = [n.latent for n in shown if n.layer == reader.layer and n.kind != ERROR]
        names = reader.names(mine, setup.vocabulary, setup.head)
        label |= {n: names[n.latent] for n in shown if n.layer == reader.layer and n.kind != ERROR}
    nodes["label"] = [label.get(n, "what the SAE does not explain" if n.kind == ERROR else "") for n in made]
    return nodes.iloc[np.argsort(-nodes[method].abs().to_numpy(), kind="stable")].reset_index(drop=True)


def position_table(
    scored: Mapping[int, Scored], method: Method, texts: Sequence[str], nodes: pd.DataFrame
) -> pd.DataFrame:
    frames = []
    best = nodes.drop_duplicates(["layer", "position"]).set_index(["layer", "position"])["node"]
    for layer, s in scored.items():
        features, errors = s.features(method).sum(-1).numpy(), s.errors(method).numpy()
        frame = pd.DataFrame({"layer": layer, "position": np.arange(len(texts)), "token": texts})
        frame["features"], frame["error"], frame["all"] = features, errors, features + errors
        frame["strongest"] = [best.get((layer, p), "") for p in frame["position"]]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def site_table(
    setup: Setup, prompt: Prompt, scored: Mapping[int, Scored], method: Method, agreement: Mapping[int, float]
) -> pd.DataFrame:
    records = []
    for reader in setup.readers:
        s = scored[reader.layer]
        known = s.baseline is not None
        total, should = s.completeness(prompt.metric) if known else (float("nan"),) * 2
        records.append(
            {
                "layer": reader.layer,
                "sae": reader.folder,
                "weights": reader.weights,
                "untraced": int((~s.traced_T).sum()),
                "active": float((s.z_TM[s.traced_T] > 0).sum(1).float().mean()) if s.traced_T.any() else float("nan"),
                "features": float(s.features(method).sum()),
                "errors": float(s.errors(method).sum()),
                "error_share": s.error_share(method),
                "baseline_metric": float("nan") if s.baseline is None else s.baseline,
                "sum": total,
                "should_be": should,
                "gap": abs(total - should) / max(abs(should), 1e-9) if known else float("nan"),
                "recorded": agreement.get(reader.layer, float("nan")),
            }
        )
    return pd.DataFrame(records)


def notes(
    setup: Setup, scored: Mapping[int, Scored], agreement: Mapping[int, float], metric: float, *, first: bool
) -> list[str]:
    """What a reader should know.

    Args:
        first: whether the target is the most likely token.
    """
    notes = []
    untraced = sum(int((~s.traced_T).sum()) for s in scored.values())
    if untraced:
        notes.append(
            f"{untraced} rows (first positions, and attention sinks by their norm) have no nodes and are left as they "
            "are in every ablation."
        )
    for layer, s in scored.items():
        if s.baseline is not None:
            total, should = s.completeness(metric)
            if abs(total - should) > MOST_GAP * abs(should):
                notes.append(
                    f"Integrated gradients of layer {layer} sum to {total:.3g} where they should sum to {should:.3g}: "
                    "the way from the baseline is too winding for so few points. Raise --steps, use --baseline mean, "
                    "or the gradient alone (--steps 0)."
                )
    if not first:
        notes.append("The target is not the model's most likely token.")
    for reader in setup.readers:
        far = agreement.get(reader.layer)
        dtype = setup.run.rows_dtype()
        if far is not None and dtype is not None and far > tolerance(reader.hook_point, dtype):
            notes.append(
                f"Rows of `{reader.hook_point}` recorded in the run differ by up to {far:.2g} (relative) from those "
                "computed here: what is traced may not be what was served."
            )
    if not agreement:
        notes.append("The run holds no rows of these layers to compare with those computed here.")
    if any(r.coded is None for r in setup.readers):
        notes.append("Some features are named by what they promote alone: there are no rows to see where they fire.")
    return notes
