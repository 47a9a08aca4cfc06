"""The reports of a trace, and of direct attribution."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.report.figures import Figure, dots, layered_graph, panel_scatter, token_map, visible
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.sae.attribution import GRADIENT, INTEGRATED
from sglang_probe.sae.attribution_check import LEAST_RHO, MOST_ERROR_SHARE
from sglang_probe.studies.trace.direct import DirectResult
from sglang_probe.studies.trace.study import TraceResult
from sglang_probe.studies.trace.tables import OUTPUT, TOKEN

_HOW = (
    "The residual stream after a layer is the sum of the features that fire, a constant, and what the SAE does not "
    "explain, the error. Each is a node. Its attribution is what the metric is expected to lose when the node is set "
    "to its baseline, by the gradient of the metric; integrated gradients average that gradient on the way of the "
    "whole layer from its baseline. Later layers are the model's own.\n\n"
    "An attribution is an estimate. So the strongest nodes are ablated for real, in the model, beside random nodes of "
    "the same layer and kind that are as large."
)


def answer(result: TraceResult) -> str:
    """What was found, in a sentence."""
    top = result.nodes.head(1)
    strongest = f"The strongest node is {top['node'].iloc[0]}." if len(top) else "No node has an attribution."
    pair = [f"`{visible(t)}`" for t in (result.target, result.foil)]
    better, worse = pair if result.metric >= 0 else pair[::-1]
    size = format_number(abs(result.metric), "decimal")
    gap = f"The model prefers {better} over {worse} by {size} logits. {strongest} "
    if result.verdict is None:
        return gap + "Nothing was ablated."
    if result.circuit:
        return gap + "The check by ablation passed: the nodes below may be called a circuit of this prediction."
    return gap + f"The check by ablation did not pass: {result.verdict.failures[0]}."


def ablation_table(result: TraceResult) -> Table:
    """Predicted and true effects of the top nodes, and of their random ones on average."""
    frame = result.ablations
    if frame.empty:
        return Table(frame, "what ablating a node does")
    random = frame[~frame["top"]].assign(size=lambda f: f["true"].abs()).groupby("group")["size"].mean()
    top = frame[frame["top"]].assign(random=lambda f: f["group"].map(random))
    label = result.nodes.set_index("node")["label"]
    top = top.assign(label=top["node"].map(label).str.replace("`", ""))
    columns = [
        Column("node", kind="text"),
        Column("label", "label (heuristic)"),
        Column("predicted", "predicted", "signed"),
        Column("true", "true effect", "signed"),
        Column("random", "matched random nodes, mean size", "decimal"),
    ]
    return Table(top, "what ablating a node alone does to the metric", columns=columns, file="ablations")


def site_table(result: TraceResult) -> Table:
    """A row for each SAE."""
    columns = [
        Column("layer", kind="text"),
        Column("sae", "SAE"),
        Column("active", "features a row", "average"),
        Column("features", "attribution of features (errors)", "signed", beside="errors"),
        Column("error_share", "share of errors, by position", "percent"),
        Column("sum", "sum of integrated gradients (should be)", "signed", beside="should_be"),
        Column("gap", "gap", "percent"),
        Column("recorded", "recorded rows differ by at most", "scientific"),
    ]
    return Table(result.sites, "by layer", columns=columns, file="sites")


def trace_page(result: TraceResult) -> Page:
    """The graph, the check, and where the attribution lies."""
    v = result.verdict
    joint = result.joint
    tiles = [
        Tile("metric", format_number(result.metric, "signed"), "logit of the target minus that of the foil"),
        Tile("target", format_number(result.probabilities[0], "percent"), f"of {visible(result.target)}"),
    ]
    if v is not None:
        rank = "rank correlation of predicted and true effects"
        tiles += [
            Tile("check", "passed" if v.passed else "not passed", "top nodes ablated, beside random ones"),
            Tile("Spearman", format_number(v.rho, "correlation"), rank),
            Tile("errors", format_number(v.error_share, "percent"), "of the attribution, in the worst layer"),
        ]
    what = "Circuit" if result.circuit else "Attribution"
    return Page(
        title=f"{what} of {visible(result.target)} over {visible(result.foil)}",
        answer=answer(result),
        picture=_graph(result),
        lead=_HOW,
        tiles=tiles,
        facts=[
            ("run", result.run),
            ("request", f"{result.rid}, position {result.position}"),
            ("model", f"{result.model}, float32"),
            ("most likely token", visible(result.said)),
            ("attribution", "integrated gradients" if result.method == INTEGRATED else "gradient at the prompt"),
            ("baseline of a node", "0" if result.baseline == "zero" else "its mean over rows"),
            *((f"SAE of layer {r.layer}", f"{r.sae} ({r.weights[:16]})") for r in result.sites.itertuples()),
        ],
        sections=[
            Section(
                "Is it so? The ablations",
                _check_text(result),
                figures=[_scatter(result)],
                tables=[ablation_table(result)],
                notes=list(v.failures) if v is not None else [],
                nothing="nothing was ablated",
            ),
            Section("Where it lies", figures=[_map(result)], tables=[_node_table(result)]),
            Section(
                "How much is explained",
                f"Integrated gradients of a layer sum to the metric minus that of its baseline. Together the top nodes "
                f"that raise the metric were expected to cost {format_number(joint.get('predicted'), 'signed')}, and "
                f"cost {format_number(joint.get('true'), 'signed')}.",
                tables=[site_table(result)],
                notes=list(result.notes),
            ),
        ],
        footer="One prompt. Features are named by the tokens on which they fire and those that they raise: heuristic.",
    )


def _check_text(result: TraceResult) -> str:
    v = result.verdict
    if v is None:
        return ""
    by_method = ", ".join(
        f"{name} {format_number(result.rank_correlation(m), 'correlation')}"
        for m, name in ((GRADIENT, "gradient"), (INTEGRATED, "integrated gradients"))
        if np.isfinite(result.rank_correlation(m))
    )
    return (
        f"The word circuit is used where four things hold: predicted and true effects of single nodes have a rank "
        f"correlation of at least {LEAST_RHO:g} (here by {by_method}; p {v.rho_p:.3f}); top nodes do more than their "
        f"random ones (p {v.larger_p:.3f}); those that raise the metric do so together (p {v.joint_p:.3f}); and errors "
        f"carry at most {100 * MOST_ERROR_SHARE:.0f} % of the attribution (here {100 * v.error_share:.0f} %)."
    )


def _graph(result: TraceResult) -> Figure:
    shown = result.nodes[result.nodes["top"]] if len(result.nodes) else result.nodes
    layers = sorted(result.sites["layer"]) if len(result.sites) else []
    rows = ["tokens", *(f"layer {i}" for i in layers), "answer"]
    heads = dict(enumerate(result.tokens))
    columns = ["node", "row", "column", "kind", "value", "short", "tip"]
    records = [
        (
            r.node,
            f"layer {r.layer}",
            int(r.position),
            r.kind,
            float(getattr(r, result.method)),
            "error" if r.kind == "error" else f"f{r.latent}",
            _tip(r, result.method),
        )
        for r in shown.itertuples()
    ]
    if records:
        pair = f"{visible(result.target)} over {visible(result.foil)}"
        records.append((OUTPUT, "answer", result.position, OUTPUT, result.metric, "", pair))
    first = result.edges[result.edges["source"].str.startswith(TOKEN)] if len(result.edges) else result.edges
    for source, edges in first.groupby("source") if len(first) else ():
        at = int(str(source).rpartition("@")[2])
        sent = float(edges["value"].sum())
        tip = f"{visible(result.tokens[at])}: {format_number(sent, 'signed')}"
        records.append((str(source), "tokens", at, TOKEN, sent, "", tip))
    return layered_graph(
        pd.DataFrame(records, columns=columns),
        result.edges,
        rows,
        heads,
        title=f"What {visible(result.target)} over {visible(result.foil)} used, by layer and position",
        caption="Each mark is a feature that fires at a position, or the error of the SAE there; ringed: more than "
        "half of the strongest. An edge is the part of the upper node's attribution that comes through the lower one. "
        "Point at a mark for its name.",
        kinds=["feature", "error", TOKEN, OUTPUT],
    )


def _tip(r: object, method: str) -> str:
    value = format_number(getattr(r, method), "signed")
    return f"{r.node} on {visible(r.token)}: {value}. {r.label}".replace("`", "")  # type: ignore[attr-defined]


def _scatter(result: TraceResult) -> Figure:
    frame = result.ablations.assign(
        which=np.where(result.ablations["top"], "top nodes", "matched random nodes"),
        label=[f"{r.node} (group {r.group})" for r in result.ablations.itertuples()],
        panel="",
    )
    return panel_scatter(
        frame,
        "panel",
        "predicted",
        "true",
        "which",
        "label",
        title="Predicted and true effect of ablating a node",
        caption="Each mark is one node, ablated alone.",
        x_label="predicted",
        y_label="true",
        kind="signed",
        x_kind="signed",
    )


def _map(result: TraceResult) -> Figure:
    frame = result.positions
    largest = float(frame["all"].abs().max()) if len(frame) else 1.0
    frame = frame.assign(
        after_layer=frame["layer"].astype(str),
        share=frame["all"].abs() / (largest or 1.0),
        text=[format_number(v, "signed") for v in frame["all"]],
        strong=frame["all"].abs() > 0.5 * largest,
        tip=[
            f"features {format_number(r.features, 'signed')}, error {format_number(r.error, 'signed')}; {r.strongest}"
            for r in frame.itertuples()
        ],
    ).sort_values(["layer", "position"], ascending=[False, True])
    return token_map(
        frame,
        "after_layer",
        "position",
        "text",
        "share",
        title="Attribution by layer and position",
        caption="All nodes of a position summed, shaded by size; bold where it is more than half of the largest.",
        heads=list(result.tokens) if len(frame) else [],
        marked="strong",
        tip="tip",
    )


def _node_table(result: TraceResult) -> Table:
    frame = result.nodes.head(40)
    if frame.empty:
        return Table(frame, "strongest nodes")
    frame = frame.assign(token=frame["token"].map(visible), label=frame["label"].str.replace("`", ""))
    columns = [
        Column("node", kind="text"),
        Column("token"),
        Column("label", "label (heuristic)"),
        Column("activation", kind="decimal"),
        Column("integrated", "integrated gradients", "signed"),
        Column("gradient", kind="signed"),
    ]
    columns = [c for c in columns if c.name != "integrated" or frame["integrated"].notna().any()]
    return Table(frame, "strongest nodes", columns=columns, file="nodes")


def direct_page(result: DirectResult) -> Page:
    """What is written straight to the logits."""
    pair = f"{visible(result.target)} over {visible(result.foil)}"
    top = result.parts.head(20)
    frame = top.assign(
        name=[f"L{r.layer} {'error' if r.kind == 'error' else f'f{r.latent}'}" for r in top.itertuples()]
    )
    columns = [
        Column("layer", kind="text"),
        Column("latent", kind="text"),
        Column("label", "label (heuristic)"),
        Column("activation", kind="decimal"),
        Column("direct", "written to the metric", "signed"),
    ]
    shown = result.parts.head(40).assign(label=lambda f: f["label"].str.replace("`", ""))
    sums = [
        Column("layer", kind="text"),
        Column("sae", "SAE"),
        Column("features", kind="signed"),
        Column("error", kind="signed"),
        Column("bias", kind="signed"),
        Column("all", "all parts", "signed"),
    ]
    return Page(
        title=f"Direct logit attribution: {pair}",
        answer=direct_answer(result),
        picture=dots(
            frame.assign(of="direct"),
            "name",
            "of",
            "direct",
            kind="signed",
            title=f"Written straight to the logit of {pair}",
            x_label="logits",
        ),
        facts=[
            ("run", result.run),
            ("model", result.model),
            ("request", f"{result.rid}, position {result.position}"),
            ("text before", "".join(result.tokens)),
        ],
        sections=[
            Section(
                "Parts",
                tables=[
                    Table(shown, "strongest parts", columns=columns, file="parts"),
                    Table(result.layers, "by layer", columns=sums, file="layers"),
                ],
                notes=list(result.notes),
            )
        ],
        footer="From recorded rows, the final norm and the unembedding; the norm's scale is held fixed.",
    )


def direct_answer(result: DirectResult) -> str:
    """What was found, in a sentence."""
    best = result.parts.head(1)
    name = "nothing"
    if len(best):
        kind, layer, latent = (best[c].iloc[0] for c in ("kind", "layer", "latent"))
        name = f"the error after layer {layer}" if kind == "error" else f"feature {latent} after layer {layer}"
    return (
        f"Of {format_number(result.metric, 'signed')} logits between `{visible(result.target)}` and "
        f"`{visible(result.foil)}`, {name} writes most straight to the output (direct logit attribution: what later "
        "layers make of it is left out)."
    )
