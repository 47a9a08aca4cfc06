"""The report of wrong answers."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, dots, visible
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.debug.study import RIGHT, SHARED, WRONG, DebugResult

_HOW = (
    "A feature supports an answer by its attribution: its activation times the gradient of the answer's logit, less "
    "the mean logit, summed over the positions of a prompt. The shortlist are those that support the wrong answer over "
    "the right one most.\n\n"
    "Then each is ablated for real, at every position where it fires, in prompts of families that it was not found in; "
    "beside it stand random features of the same layer that are as active there."
)


def _pair(result: DebugResult) -> tuple[str, str]:
    """Wrong and right answer, if all cases have the same."""
    found = [result.cases[c].unique() for c in ("wrong", "right")]
    wrong, right = (
        f"`{f[0]}`" if len(f) == 1 else f"the {c} answer" for f, c in zip(found, ("wrong", "right"), strict=True)
    )
    return wrong, right


def answer(result: DebugResult) -> str:
    """What was found, in a sentence."""
    wrong, right = _pair(result)
    cases = f"{len(result.cases):,} answers {wrong} in place of {right}"
    if not len(result.tests):
        return f"Of {cases}, no feature supports the wrong one over the right one."
    if not result.apart:
        return f"{cases}: too few families of prompts to say what they hang on; what ablations do is below."
    causal, joint = result.causal, result.joint
    flips = f"{format_number(joint['flips'], 'percent')} ({format_number(joint['random_flips'], 'percent')})"
    return (
        f"{cases}: {len(causal)} of {len(result.tests)} features of the shortlist move it more than random ones do "
        f"where they were not looked for. Without all {len(result.tests)} the right answer passes the wrong one in "
        f"{flips} of the tested cases (without random features)."
    )


def test_table(result: DebugResult) -> Table:
    """A row for each feature of the shortlist."""
    frame = result.tests
    if frame.empty:
        return Table(frame, "what ablating a feature does")
    verdict = ["yes" if c and result.apart else "no" if result.apart else "not tested" for c in frame["causal"]]
    frame = frame.assign(
        name=[f"L{r.layer} f{r.latent}" for r in frame.itertuples()],
        label=frame["label"].str.replace("`", ""),
        verdict=verdict,
    )
    columns = [
        Column("name", "feature", "text"),
        Column("label", "label (heuristic)"),
        Column("loss", "lost without it", "signed", bounds=("loss_low", "loss_high")),
        Column("random", "without random ones", "signed"),
        Column("difference", "difference", "signed", bounds=("difference_low", "difference_high")),
        Column("p_holm", "p (Holm)", "decimal"),
        Column("verdict", "causal"),
        Column("flips", "right passes wrong (random)", "percent", beside="random_flips"),
        Column("predicted", "predicted", "signed"),
    ]
    return Table(frame, "what ablating a feature does to wrong minus right, logits", columns=columns, file="tests")


def debug_page(result: DebugResult) -> Page:
    """The test, the sets, and the cases."""
    wrong, right = _pair(result)
    joint = result.joint
    sets = {n: int((result.features["set"] == n).sum()) if len(result.features) else 0 for n in (WRONG, SHARED, RIGHT)}
    tiles = [
        Tile("cases", f"{len(result.cases):,}", f"in {result.cases['family'].nunique()} families"),
        Tile("causal", f"{len(result.causal)}", f"of {len(result.tests)} on the shortlist"),
        Tile("wrong minus right", format_number(result.cases["metric"].mean(), "signed"), "logits, mean of all cases"),
        Tile("without the shortlist", format_number(joint.get("loss"), "signed"), "of them are lost"),
    ]
    return Page(
        title=f"Why {visible(wrong.strip('`'))} and not {visible(right.strip('`'))}",
        answer=answer(result),
        picture=_effects(result),
        lead=_HOW,
        tiles=tiles,
        facts=[
            ("run", result.run),
            ("model", f"{result.model}, float32"),
            *((f"SAE of layer {layer}", f"{name} ({weights[:16]})") for name, weights, layer in result.saes),
        ],
        sections=[
            Section("What the wrong answer hangs on", tables=[test_table(result)], notes=list(result.notes)),
            Section(
                "What supports either answer",
                f"Of the features that support the wrong answer most and those that support the right one most, "
                f"{sets[SHARED]} are shared; {sets[WRONG]} are of the wrong answer alone, {sets[RIGHT]} of the right "
                "one.",
                tables=[_set_table(result, name) for name in (WRONG, RIGHT, SHARED)],
                nothing="no feature supports them",
            ),
            Section("Cases", tables=[_case_table(result)]),
        ],
        footer="Features are named by the tokens on which they fire and those that they raise: heuristic. What the "
        "SAEs do not explain is in none of them.",
    )


def _effects(result: DebugResult) -> Figure:
    frames = []
    for column, name in (("loss", "without it"), ("random", "without random features")):
        frame = result.tests
        if column in frame:
            low, high = (frame.get(f"{column}{end}") for end in ("_low", "_high"))
            names = [f"L{r.layer} f{r.latent}" for r in frame.itertuples()]
            made = {"feature": names, "of": name, "lost": frame[column], "low": low, "high": high}
            frames.append(pd.DataFrame(made))
    columns = ["feature", "of", "lost", "low", "high"]
    both = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    return dots(
        both,
        "feature",
        "of",
        "lost",
        kind="signed",
        low="low",
        high="high",
        title="What wrong minus right loses without a feature",
        caption="Means over the families of the tested cases, with 95 % intervals.",
        x_label="logits",
    )


def _set_table(result: DebugResult, name: str) -> Table:
    frame = result.features[result.features["set"] == name] if len(result.features) else result.features
    if len(frame):
        frame = frame.assign(
            name=[f"L{r.layer} f{r.latent}" for r in frame.itertuples()], label=frame["label"].str.replace("`", "")
        )
    columns = [
        Column("name", "feature", "text"),
        Column("label", "label (heuristic)"),
        Column("wrong", "supports the wrong answer (the right one)", "signed", beside="right"),
        Column("difference", "wrong minus right", "signed"),
        Column("active", "fires in", "percent"),
    ]
    return Table(frame, name, columns=columns if len(frame) else (), file="features")


def _case_table(result: DebugResult) -> Table:
    frame = result.cases.assign(before=result.cases["before"].map(lambda t: str(t).replace("\n", "⏎")))
    columns = [
        Column("rid", "request", "text"),
        Column("family"),
        Column("before", "text before"),
        Column("wrong", "wrong answer (right)", beside="right"),
        Column("metric", "wrong minus right, logits", "signed"),
        Column("half", "used"),
    ]
    return Table(frame, "cases", columns=columns, long=True, file="cases")
