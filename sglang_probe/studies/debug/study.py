"""Wrong against right: which features support either answer, and which of them the wrong one hangs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.report.figures import visible
from sglang_probe.sae.attribution import FEATURE, Node, Prompt
from sglang_probe.sae.causal import LEVEL, alike, causal_tests, family_means, halves, least_p
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.stats.intervals import LEAST_CLUSTERS, mean_intervals
from sglang_probe.studies.base import Measured
from sglang_probe.studies.debug.cases import Case, answered, read_cases
from sglang_probe.studies.trace.setup import Setup, prepare

Array = np.ndarray[Any, Any]
WRONG, RIGHT, SHARED = "wrong only", "right only", "shared"
ENOUGH = 20
"""Cases below which the page says that there are few."""
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class DebugResult(Measured):
    """What the wrong answers hang on."""

    run: str
    model: str
    saes: Sequence[tuple[str, str, int]]
    """Name, hash of the weights and layer of each."""
    cases: pd.DataFrame
    """A row each: `rid`, `family`, `before` (last tokens before the answer), `wrong`, `right`, `metric` (logit of the
    wrong minus that of the right answer), `half` (`found in`, `tested in`, or `both`)."""
    features: pd.DataFrame
    """Those that support either answer most where they were looked for: `layer`, `latent`, `set`, `wrong`, `right`
    (attribution to the answer's logit, less the mean logit), `difference` (to wrong over right), `active` (share of
    cases in which it fires), `label`."""
    tests: pd.DataFrame
    """A row for each feature of the shortlist, by ablation where it was not found: `layer`, `latent`, `label`,
    `predicted`, the columns of `causal_tests`, `flips` and `random_flips` (share of cases in which the right answer
    passes the wrong one), `cases`, `families`, `randoms`. `causal` is false of all where they were not `apart`."""
    joint: Mapping[str, Any]
    """All features of the shortlist together: `features`, `loss` with ends, `random` (mean over random sets) with ends,
    `flips`, `random_flips`."""
    apart: bool
    """Whether features were tested in families that they were not found in."""
    notes: Sequence[str] = field(default_factory=list)

    @property
    def causal(self) -> pd.DataFrame:
        """Features that the wrong answer was shown to hang on; none where they were tested where they were found."""
        return self.tests[self.tests["causal"].astype(bool)]

    def to_json(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "run": self.run,
            "model": self.model,
            "saes": [{"sae": n, "weights_sha256": w, "layer": i} for n, w, i in self.saes],
            "cases": len(self.cases),
            "families": int(self.cases["family"].nunique()),
            "found_and_tested_apart": self.apart,
            "mean_metric": float(self.cases["metric"].mean()),
            "sets": {name: int((self.features["set"] == name).sum()) for name in (WRONG, RIGHT, SHARED)},
            "features": self.features.to_dict("records"),
            "tests": self.tests.to_dict("records"),
            "causal": self.causal[["layer", "latent"]].to_dict("records"),
            "joint": dict(self.joint),
            "notes": list(self.notes),
        }

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """Every table."""
        return {"cases": self.cases, "features": self.features, "tests": self.tests}


def debug(
    path: Path,
    saes: Sequence[Path],
    *,
    right: str | None = None,
    wrong: str | None = None,
    step: int = 1,
    cases: Path | None = None,
    top: int = 20,
    shortlist: int = 6,
    random: int = 4,
    rows: Path | None = None,
    model: Path | None = None,
    sinks: Sinks | None = None,
    most: int = 20_000,
    seed: int = 0,
    tell: Tell = lambda done, of: None,
) -> DebugResult:
    """Debug wrong answers.

    Args:
        right, wrong, step: every request whose token number `step` is `wrong` (default: any but the right one).
        cases: a file of cases instead (`cases.read_cases`).
        top: features in the set of either answer. shortlist: features that are ablated. random: matched ones for each.

    Raises:
        ConfigError: there are no such cases; see `trace`.
    """
    if (right is None) == (cases is None):
        raise ConfigError("name the right answer (--right) or a file of cases (--cases), one of them")
    setup = prepare(path, saes, rows=rows, model=model, sinks=sinks, most=most, seed=seed)
    found = answered(setup, right, wrong, step) if right is not None else read_cases(setup, cases or Path())
    rng = np.random.default_rng(seed)
    family = np.array([c.family for c in found])
    half = halves(family, rng)
    total = 2 * len(found)
    looked: list[_Looked] = []
    for i, case in enumerate(found):
        looked.append(_look(setup, case))
        tell(i + 1, total)
    search = np.ones(len(found), dtype=bool) if half is None else half
    test = search if half is None else ~half
    support = {name: _mean([x.support[name] for x in looked], search) for name in ("wrong", "right", "difference")}
    activity = _mean([x.activity for x in looked], search)
    layers = [r.layer for r in setup.readers]
    order = np.argsort(-support["difference"], axis=None, kind="stable")
    chosen = [divmod(int(i), support["difference"].shape[1]) for i in order[:shortlist]]
    chosen = [(s, m) for s, m in chosen if support["difference"][s, m] > 0]
    groups = _groups(chosen, activity, random, rng)
    tested = [i for i in range(len(found)) if test[i]]
    loss, others, together, beside = _ablate(
        setup, found, looked, tested, chosen, groups, rng, lambda n: tell(len(found) + n, len(found) + len(tested))
    )
    metric = np.array([looked[i].metric for i in tested])
    features = _features(setup, support, looked, search, top, layers)
    tests = _tests(setup, loss, others, metric, family[test], chosen, groups, support["difference"], layers)
    if half is None:
        tests["causal"] = False
    joint = _joint(together, beside, metric, family[test], chosen, layers)
    notes = _notes(setup, found, half, tests)
    return DebugResult(
        setup.run.path.name,
        setup.name,
        [(r.folder, r.weights, r.layer) for r in setup.readers],
        _cases(setup, found, looked, half),
        features,
        tests,
        joint,
        half is not None,
        notes,
    )


@dataclass(frozen=True)
class _Looked:
    """A case: numbers by site and latent, `[S, M]`."""

    prompt: Prompt
    metric: float
    support: Mapping[str, Array]
    activity: Array
    at: Mapping[int, Array]
    """By layer, where each latent fires, bool `[T, M]`."""


def _look(setup: Setup, case: Case) -> _Looked:
    size = int(setup.model.config.vocab_size)
    one = torch.eye(2)
    wrong, right = (torch.zeros(size).index_add_(0, torch.tensor([case.wrong, case.right]), e) for e in one)
    prompt = setup.prompt(case.ids, wrong - right)
    width = max(s.sae.latents for s in prompt.sites.values())
    support = {name: np.zeros((len(prompt.sites), width)) for name in ("wrong", "right")}
    activity = np.zeros((len(prompt.sites), width))
    fires = {}
    gradients = prompt.gradients([w - 1 / size for w in (wrong, right)])
    for i, (layer, site) in enumerate(prompt.sites.items()):
        with torch.no_grad():
            z = site.split(prompt.rows[layer])[0] * prompt.traced[layer][:, None]
        latents = z.shape[1]
        for name, g in zip(support, gradients, strict=True):
            support[name][i, :latents] = (z * (g[layer] @ site.sae.W_dec.T)).sum(0).numpy()
        activity[i, :latents] = (z.sum(0) * site.sae.decoder_norms).numpy()
        fires[layer] = (z != 0).numpy()
    # Gradients are linear in the metric.
    support["difference"] = support["wrong"] - support["right"]
    return _Looked(prompt, prompt.metric, support, activity, fires)


def _mean(values: Sequence[Array], which: Array) -> Array:
    found: Array = np.mean([v for v, w in zip(values, which, strict=True) if w], axis=0)
    return found


def _groups(chosen: Sequence[tuple[int, int]], activity: Array, random: int, rng: Any) -> list[list[tuple[int, int]]]:
    taken: dict[int, set[int]] = {}
    for s, m in chosen:
        taken.setdefault(s, set()).add(m)
    out = []
    for s, m in chosen:
        drawn = alike(activity[s], m, random, taken[s], rng)
        taken[s].update(drawn)
        out.append([(s, d) for d in drawn])
    return out


def _ablate(
    setup: Setup,
    cases: Sequence[Case],
    looked: Sequence[_Looked],
    tested: Sequence[int],
    chosen: Sequence[tuple[int, int]],
    groups: Sequence[Sequence[tuple[int, int]]],
    rng: np.random.Generator,
    tell: Callable[[int], None],
) -> tuple[Array, Array, Array, Array]:
    """What the metric loses in each tested case: without each feature `[C, F]`, without random ones `[C, F, R]` (NaN
    where there are fewer), without all `[C]`, and without random sets `[C, R]`."""
    most = max((len(g) for g in groups), default=0)
    loss = np.zeros((len(tested), len(chosen)))
    others = np.full((len(tested), len(chosen), most), np.nan)
    together, beside = np.zeros(len(tested)), np.full((len(tested), most), np.nan)
    layers = [r.layer for r in setup.readers]
    sets = [[g[r] for g in groups if r < len(g)] for r in range(most)]
    for c, i in enumerate(tested):
        x = looked[i]

        def nodes(features: Sequence[tuple[int, int]], x: _Looked = x) -> list[Node]:
            fires = [(layers[s], m, np.flatnonzero(x.at[layers[s]][:, m])) for s, m in features]
            return [Node(layer, int(t), FEATURE, m) for layer, m, at in fires for t in at]

        asked = [[f] for f in chosen] + [[f] for g in groups for f in g] + [list(chosen)] + sets
        wanted = [nodes(f) for f in asked]
        # What does not fire in this prompt costs nothing, and is not computed.
        some = [n for n in wanted if n]
        lost = iter(x.metric - x.prompt.ablated(some))
        found = np.array([next(lost) if n else 0.0 for n in wanted])
        loss[c] = found[: len(chosen)]
        at = len(chosen)
        for f, g in enumerate(groups):
            others[c, f, : len(g)] = found[at : at + len(g)]
            at += len(g)
        together[c] = found[at]
        beside[c] = found[at + 1 :]
        tell(c + 1)
    return loss, others, together, beside


def _features(
    setup: Setup, support: Mapping[str, Array], looked: Sequence[_Looked], search: Array, top: int, layers: list[int]
) -> pd.DataFrame:
    width = support["wrong"].shape[1]
    best = {
        name: [int(i) for i in np.argsort(-support[name], axis=None, kind="stable")[:top] if support[name].flat[i] > 0]
        for name in ("wrong", "right")
    }
    records = []
    for i in dict.fromkeys([*best["wrong"], *best["right"]]):
        s, m = divmod(i, width)
        both = i in best["wrong"], i in best["right"]
        fires = [bool(x.at[layers[s]][:, m].any()) for x, w in zip(looked, search, strict=True) if w]
        records.append(
            {
                "layer": layers[s],
                "latent": m,
                "set": SHARED if all(both) else WRONG if both[0] else RIGHT,
                **{name: float(support[name][s, m]) for name in ("wrong", "right", "difference")},
                "active": float(np.mean(fires)),
            }
        )
    columns = ["layer", "latent", "set", "wrong", "right", "difference", "active"]
    frame = pd.DataFrame(records, columns=columns).sort_values("difference", ascending=False, ignore_index=True)
    return frame.assign(label=_labels(setup, frame))


def _labels(setup: Setup, frame: pd.DataFrame) -> list[str]:
    names = {
        r.layer: r.names(frame.loc[frame["layer"] == r.layer, "latent"].tolist(), setup.vocabulary, setup.head)
        for r in setup.readers
    }
    return [names[r.layer][r.latent] for r in frame.itertuples()]


def _tests(
    setup: Setup,
    loss: Array,
    others: Array,
    metric: Array,
    family: Array,
    chosen: Sequence[tuple[int, int]],
    groups: Sequence[Sequence[tuple[int, int]]],
    predicted: Array,
    layers: list[int],
) -> pd.DataFrame:
    if not chosen:
        return pd.DataFrame(columns=["layer", "latent", "label", "predicted", "loss", "random", "difference", "causal"])
    # A feature that no other is like has nothing to stand beside.
    kept = [f for f, g in enumerate(groups) if g]
    beside = np.stack(
        [np.nanmean(others[:, f], axis=1) if groups[f] else np.zeros(len(metric)) for f in range(len(chosen))], 1
    )
    tests = causal_tests(loss, beside, family)
    tests.loc[~tests.index.isin(kept), "causal"] = False
    frame = pd.DataFrame({"layer": [layers[s] for s, _ in chosen], "latent": [m for _, m in chosen]})
    frame["label"] = _labels(setup, frame)
    frame["predicted"] = [float(predicted[s, m]) for s, m in chosen]
    frame = pd.concat([frame, tests], axis=1)
    frame["flips"] = ((metric[:, None] > 0) & (metric[:, None] - loss <= 0)).mean(0)
    flips = (metric[:, None, None] > 0) & (metric[:, None, None] - others <= 0)
    frame["random_flips"] = [float(flips[:, f, : len(g)].mean()) if g else float("nan") for f, g in enumerate(groups)]
    frame["cases"], frame["families"] = len(metric), len(np.unique(family))
    frame["randoms"] = [len(g) for g in groups]
    return frame


def _joint(
    together: Array,
    beside: Array,
    metric: Array,
    family: Array,
    chosen: Sequence[tuple[int, int]],
    layers: list[int],
) -> dict[str, Any]:
    random = beside.mean(1) if beside.shape[1] else np.full(len(metric), np.nan)
    found = mean_intervals(family_means(np.stack([together, random, together - random], 1), family))
    names = ("loss", "random", "difference")
    out: dict[str, Any] = {"features": [{"layer": layers[s], "latent": m} for s, m in chosen]}
    for i, name in enumerate(names):
        ends = (found.estimate, found.low, found.high)
        out |= {f"{name}{end}": float(v[i]) for end, v in zip(("", "_low", "_high"), ends, strict=True)}
    wrong = metric > 0
    out["flips"] = float((wrong & (metric - together <= 0)).mean())
    flips = wrong[:, None] & (metric[:, None] - beside <= 0)
    out["random_flips"] = float(flips.mean()) if beside.shape[1] else float("nan")
    return out


def _cases(setup: Setup, cases: Sequence[Case], looked: Sequence[_Looked], half: Array | None) -> pd.DataFrame:
    where = ["both"] * len(cases) if half is None else np.where(half, "found in", "tested in")
    return pd.DataFrame(
        {
            "rid": [c.name for c in cases],
            "family": [c.family for c in cases],
            "before": ["".join(setup.text(t) for t in c.ids[-12:]) for c in cases],
            "wrong": [visible(setup.text(c.wrong)) for c in cases],
            "right": [visible(setup.text(c.right)) for c in cases],
            "metric": [x.metric for x in looked],
            "half": where,
        }
    )


def _notes(setup: Setup, cases: Sequence[Case], half: Array | None, tests: pd.DataFrame) -> list[str]:
    notes = []
    families = len({c.family for c in cases})
    if half is None:
        notes.append(
            f"{families} families of prompts are too few to find features in some and test them in others "
            f"({2 * LEAST_CLUSTERS} are needed): effects are of the prompts that the features were chosen for, and no "
            "feature is called causal."
        )
    elif len(tests) and (least := least_p(len(tests), tests["families"].iloc[0])) > LEVEL:
        notes.append(
            f"{tests['families'].iloc[0]} families to test {len(tests)} features in can call none of them causal: the "
            f"smallest p there is, adjusted, is {least:.3f}. Record more families, or shorten the list."
        )
    if len(cases) < ENOUGH:
        notes.append(f"{len(cases)} cases are few: {ENOUGH} and more say what wrong answers have in common.")
    if len(tests) and (tests["randoms"] == 0).any():
        notes.append("Some features have no random ones like them, and are not tested.")
    if any(r.coded is None for r in setup.readers):
        notes.append("Some features are named by what they promote alone: there are no rows to see where they fire.")
    return notes
