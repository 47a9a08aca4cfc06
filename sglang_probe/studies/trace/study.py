"""One prediction of a recorded request: what it used, and whether that is so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.attribution import (
    GRADIENT,
    INTEGRATED,
    Method,
    Node,
    Prompt,
    Scored,
)
from sglang_probe.sae.attribution_check import Verdict, judge, matched, random_sets, top_nodes
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.studies.base import Measured
from sglang_probe.studies.lens.study import token_of
from sglang_probe.studies.trace.setup import MOST_TOKENS, Baseline, Setup, prepare
from sglang_probe.studies.trace.tables import edges, name_of, node_table, notes, position_table, site_table

Array = np.ndarray[Any, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class TraceResult(Measured):
    """What a prediction used."""

    run: str
    model: str
    rid: str
    position: int
    tokens: Sequence[str]
    """Of the prompt up to `position`."""
    target: str
    foil: str
    said: str
    """The most likely token."""
    metric: float
    """Logit of the target minus that of the foil."""
    probabilities: tuple[float, float]
    """Of target and foil."""
    method: Method
    baseline: Baseline
    sites: pd.DataFrame
    """A row for each SAE: `layer`, `sae`, `weights`, `untraced` (rows left as they are), `active` (mean number of
    features), `features` and `errors` (sums of attributions), `error_share`, `baseline_metric`, `sum`, `should_be`,
    `gap` (of integrated gradients; relative), `recorded` (largest relative distance of the run's rows)."""
    nodes: pd.DataFrame
    """A row for each node with an attribution, the largest first: `node`, `layer`, `position`, `token`, `kind`,
    `latent`, `activation` (of an error: its length), `gradient`, `integrated`, `top` (whether it is shown), `label`."""
    positions: pd.DataFrame
    """By `layer` and `position`: `token`, `features`, `error`, `all` (sums of attributions), `strongest`."""
    edges: pd.DataFrame
    """The strongest between shown nodes: `source`, `target`, `from_layer`, `to_layer`, `value`."""
    ablations: pd.DataFrame
    """A row for each node that was ablated alone: `node`, `group`, `top`, `kind`, `predicted`, `gradient`,
    `integrated`, `true`."""
    joint: Mapping[str, Any]
    """Of the top nodes that raise the metric, together: `nodes`, `predicted`, `true`, `random` (a list)."""
    verdict: Verdict | None
    notes: Sequence[str] = field(default_factory=list)

    @property
    def circuit(self) -> bool:
        """Whether the check passed, so that the word may be used."""
        return self.verdict is not None and self.verdict.passed

    def rank_correlation(self, method: Method) -> float:
        """Spearman of single nodes' true effects and what a method predicts; NaN if it was not asked."""
        from sglang_probe.stats.agreement import spearman

        some = self.ablations.dropna(subset=[method]) if method in self.ablations else self.ablations.iloc[:0]
        return float(spearman(some[method], some["true"])) if len(some) > 2 else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        shown = self.nodes[self.nodes["top"]] if len(self.nodes) else self.nodes
        v = self.verdict
        return {
            "run": self.run,
            "model": self.model,
            "rid": self.rid,
            "position": self.position,
            "tokens": list(self.tokens),
            "target": self.target,
            "foil": self.foil,
            "said": self.said,
            "metric": self.metric,
            "probabilities": {"target": self.probabilities[0], "foil": self.probabilities[1]},
            "method": self.method,
            "baseline": self.baseline,
            "sites": self.sites.to_dict("records"),
            "nodes": shown.to_dict("records"),
            "edges": self.edges.to_dict("records"),
            "ablations": self.ablations.to_dict("records"),
            "joint": dict(self.joint),
            "check": None
            if v is None
            else {
                "passed": v.passed,
                "rank_correlation": v.rho,
                "rank_correlation_p": v.rho_p,
                "rank_correlation_by_method": {m: self.rank_correlation(m) for m in (GRADIENT, INTEGRATED)},
                "larger_than_random_p": v.larger_p,
                "joint_p": v.joint_p,
                "error_share": v.error_share,
                "failures": list(v.failures),
            },
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table."""
        return {
            "nodes": self.nodes,
            "positions": self.positions,
            "edges": self.edges,
            "ablations": self.ablations,
            "sites": self.sites,
        }


def trace(
    path: Path,
    saes: Sequence[Path],
    *,
    rid: str | None = None,
    position: int | None = None,
    target: str | None = None,
    foil: str | None = None,
    baseline: Baseline = "zero",
    steps: int = 0,
    top: int = 10,
    random: int = 5,
    rows: Path | None = None,
    model: Path | None = None,
    sinks: Sinks | None = None,
    most: int = 20_000,
    seed: int = 0,
    tell: Tell = lambda what: None,
) -> TraceResult:
    """Trace a prediction.

    Args:
        saes: folders, one for each layer.
        rid: request; default: the first. position: whose prediction; default: the prompt's last.
        target: what is predicted: text of a token, or `#ID`; default: the recorded next token. foil: what it is
            compared with; default: the likeliest other token.
        steps: of integrated gradients; 0: the gradient at the prompt. Single ablations of a language model were
            predicted far better by the latter (experiments/trace-smollm2).
        top: nodes that are ablated. random: matched random ones for each.
        rows: run whose rows give names and means; default: `path`.

    Raises:
        ConfigError: there is no such request, position or token; target and foil are one; an SAE does not fit.
        UnsupportedError: `transformers` is not installed, or the architecture was not reviewed.
    """
    tell("reading the SAEs")
    setup = prepare(path, saes, rows=rows, model=model, baseline=baseline, sinks=sinks, most=most, seed=seed)
    rid = str(setup.run.requests()["rid"].iloc[0]) if rid is None else rid
    ids, at, following = recorded_prompt(setup, rid, position)
    tell("reading the model")
    wanted = following if target is None else token_of(target, setup.vocabulary)
    if wanted is None:
        raise ConfigError(f"nothing was recorded after position {at} of `{rid}`", fix="name a --target")
    tell("attributing")
    logits = setup.prompt(ids, torch.zeros(_vocabulary(setup))).logits_V
    other = _likeliest_but(logits, wanted) if foil is None else token_of(foil, setup.vocabulary)
    if other == wanted:
        raise ConfigError(f"target and foil are the same token, `{setup.text(wanted)}`", fix="name another --foil")
    weights = torch.zeros(len(logits))
    weights[wanted], weights[other] = 1.0, -1.0
    prompt = setup.prompt(ids, weights)
    scored = prompt.scored(steps=steps)
    method: Method = INTEGRATED if steps else GRADIENT
    chosen = top_nodes(scored, method, top)
    tell("edges")
    shown = top_nodes(scored, method, max(2 * top, 20))
    sent = edges(prompt, scored, shown, method)
    tell("ablating")
    rng = np.random.default_rng(seed)
    groups = matched(scored, chosen, random, rng)
    ablations, joint = ablate(prompt, scored, chosen, groups, rng, method)
    share = max((s.error_share(method) for s in scored.values()), default=float("nan"))
    verdict = None
    if chosen:
        verdict = judge(
            ablations["predicted"].to_numpy(),
            ablations["true"].to_numpy(),
            ablations["group"].to_numpy(),
            ablations["top"].to_numpy(),
            joint=joint["true"],
            joint_random=np.array(joint["random"]),
            error_share=share,
            seed=seed,
        )
    agreement = setup.agreement(rid, prompt)
    nodes = node_table(setup, prompt, scored, method, ids, shown)
    texts = [setup.text(t) for t in ids]
    p = torch.softmax(prompt.logits_V, -1)
    return TraceResult(
        setup.run.path.name,
        setup.name,
        rid,
        at,
        texts,
        setup.text(wanted),
        setup.text(other),
        setup.text(int(prompt.logits_V.argmax())),
        prompt.metric,
        (float(p[wanted]), float(p[other])),
        method,
        baseline,
        site_table(setup, prompt, scored, method, agreement),
        nodes,
        position_table(scored, method, texts, nodes),
        sent,
        ablations,
        joint,
        verdict,
        notes(setup, scored, agreement, prompt.metric, first=int(prompt.logits_V.argmax()) == wanted),
    )


def recorded_prompt(setup: Setup, rid: str, position: int | None) -> tuple[list[int], int, int | None]:
    """Ids up to a position of a request, the position, and the token recorded after it (None: there is none).

    Raises:
        ConfigError: the request has no such position, or it is too long.
    """
    r = setup.recorded(rid)
    whole = [*map(int, r["prompt_ids"]), *map(int, r["output_ids"])]
    at = len(r["prompt_ids"]) - 1 if position is None else position
    if not 0 <= at < len(whole):
        raise ConfigError(f"`{rid}` has the positions 0 to {len(whole) - 1}, not {at}")
    if at >= MOST_TOKENS:
        raise ConfigError(
            f"position {at} of `{rid}` is past {MOST_TOKENS} tokens, and gradients keep all of them in memory",
            fix="choose an earlier --position or a shorter request",
        )
    return whole[: at + 1], at, whole[at + 1] if at + 1 < len(whole) else None


def ablate(
    prompt: Prompt,
    scored: Mapping[int, Scored],
    top: Sequence[Node],
    groups: Sequence[Sequence[Node]],
    rng: np.random.Generator,
    method: Method,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Ablate top nodes and their matched random ones, each alone; and together the top ones that raise the metric,
    beside random sets."""
    single = [(n, g, True) for g, n in enumerate(top)]
    single += [(n, g, False) for g, group in enumerate(groups) for n in group]
    raising = [n for n in top if scored[n.layer].of(n, method) > 0]
    beside = [g for n, g in zip(top, groups, strict=True) if n in raising]
    sets = random_sets(raising, beside, rng) if any(beside) else []
    metrics = prompt.ablated([[n] for n, _, _ in single] + [raising] + sets)
    lost = prompt.metric - metrics
    records = []
    for (n, group, is_top), true in zip(single, lost[: len(single)], strict=True):
        known = {m: scored[n.layer].of(n, m) for m in scored[n.layer].gradients}
        records.append(
            {
                "node": name_of(n),
                "group": group,
                "top": is_top,
                "kind": n.kind,
                "predicted": known[method],
                GRADIENT: known[GRADIENT],
                INTEGRATED: known.get(INTEGRATED, float("nan")),
                "true": float(true),
            }
        )
    columns = ["node", "group", "top", "kind", "predicted", GRADIENT, INTEGRATED, "true"]
    frame = pd.DataFrame(records, columns=columns)
    joint = {
        "nodes": [name_of(n) for n in raising],
        "predicted": float(sum(scored[n.layer].of(n, method) for n in raising)),
        "true": float(lost[len(single)]),
        "random": [float(x) for x in lost[len(single) + 1 :]],
    }
    return frame, joint


def _vocabulary(setup: Setup) -> int:
    return int(setup.model.config.vocab_size)


def _likeliest_but(logits_V: torch.Tensor, token: int) -> int:
    best = logits_V.topk(2).indices.tolist()
    return int(best[1] if best[0] == token else best[0])
