"""The report of the decay study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import lines
from sglang_probe.report.numbers import format_interval, format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import facts, footer, in_points, only, proof
from sglang_probe.studies.steer_decay.statistics import DIFFERENCE, HUMAN, OWN, VECTOR
from sglang_probe.studies.steer_decay.study import SteerDecayResult


def answer(result: SteerDecayResult) -> str:
    """What was found, in a few sentences."""
    first, last = result.config.onsets[0], result.config.onsets[-1]
    found = result.decay.set_index("what") if len(result.decay) else result.decay
    if OWN not in found.index:
        return "No decay can be told: fewer than two onsets were measured in the same texts."
    own = found.loc[OWN]
    at_first = only(result.effects, source=OWN, arm=VECTOR, onset=first).iloc[0]
    if at_first["shift_low"] <= 0 <= at_first["shift_high"]:
        return (
            f"`{result.config.vector}` has no effect at step {first} that is told from zero "
            f"({_with_ends(at_first, 'shift', 'signed')} nats), so that nothing can decay."
        )
    text = (
        f"From step {first} to step {last} the effect of one dose of `{result.config.vector}` changes by the factor "
        f"{_with_ends(own, 'ratio', 'decimal')} in the model's own text"
    )
    if HUMAN in found.index:
        text += f", and by {_with_ends(found.loc[HUMAN], 'ratio', 'decimal')} in human text at the same positions"
    text += ". "
    if DIFFERENCE not in found.index or pd.isna(found.loc[DIFFERENCE, "slope_low"]):
        return text + "Too few texts for an interval of the difference."
    low, high = found.loc[DIFFERENCE, "slope_low"], found.loc[DIFFERENCE, "slope_high"]
    if low <= 0 <= high:
        return text + "The slopes differ by no more than texts do: nothing specific to decoding was found."
    faster = (high < 0) == (at_first["shift"] > 0)
    return text + f"The effect falls {'faster' if faster else 'more slowly'} in decoding than depth explains."


def effects_table(result: SteerDecayResult) -> Table:
    """Effect and side effect at each onset."""
    columns = [
        Column("source"),
        Column("arm"),
        Column("onset", "onset (step)"),
        _measure("shift", "log-odds of the target, nats", "signed"),
        _measure("kl", "KL to the plain model, nats", "scientific"),
        _measure("after_shift", "log-odds in the steps after", "signed"),
        Column("instability", "SD over texts / mean", "decimal"),
        Column("anti", "against the mean", "percent", bounds=("anti_low", "anti_high")),
        Column("families", "texts"),
    ]
    return Table(result.effects, "effect of one dose", columns=columns, file="effects")


def decay_table(result: SteerDecayResult) -> Table:
    """Slopes and ratios."""
    return Table(result.decay, "change of the effect with the onset", columns=_decay_columns(), file="decay")


def decay_page(result: SteerDecayResult) -> Page:
    """Whether the effect decays with depth, whether decoding has a part in it, and what remains after the dose."""
    c = result.config
    curves = result.effects
    if len(curves):
        curves = curves.assign(curve=curves["arm"] + ", " + curves["source"])
    later = only(result.after, source=OWN)
    if len(later):
        later = later.assign(curve="onset " + later["onset"].astype(str))
    told = facts(
        result.manifest,
        ("vector", f"{c.vector}, {c.strength:g} {c.unit}, {c.window} steps"),
        ("controls", f"{', '.join(c.random)}; zero dose; human text at the same positions"),
        ("texts", str(result.families)),
    )
    target = (
        "Its target is what the vector's own unembedding favours: it says that the vector acts, not that it means what "
        "its name says."
        if c.target is None
        else ""
    )
    vector = only(result.effects, arm=VECTOR)
    at_first = only(vector, source=OWN, onset=c.onsets[0])
    tiles = []
    if len(at_first):
        row = at_first.iloc[0]
        tiles = [
            Tile("effect at the first onset", format_number(row["shift"], "signed"), "nats of log-odds of the target"),
            Tile("against the mean", format_number(row["anti"], "percent"), "texts that are pushed the other way"),
            Tile(
                "before the onset", format_number(result.before, "scientific"), "largest KL, where nothing is steered"
            ),
        ]
    return Page(
        title=f"Steering decay: {c.vector}",
        answer=answer(result),
        picture=lines(
            curves,
            "onset",
            "shift",
            "curve",
            title="Shift of the target's log-odds by the step of the dose",
            caption="Bands: 95 % over texts. The zero dose is the floor of the numerics.",
            x_label="onset, step",
            y_label="nats",
            kind="signed",
            low="shift_low",
            high="shift_high",
            log_x=True,
        ),
        tiles=tiles,
        facts=told,
        lead="Every arm is decoded by force over the same tokens, so that it differs from the plain model in nothing "
        f"but the dose. {target}",
        sections=[
            Section(
                "Decay, and the depth control",
                "Slope: change of the effect per doubling of the onset, within each text. Ratio: last onset over "
                "first. The depth control is human text at the same positions; what falls there too is an effect of "
                "depth, not of decoding. p-values are adjusted (Holm) over the rows of a table.",
                tables=[
                    decay_table(result),
                    Table(result.decay_kl, "the same of the KL", columns=_decay_columns("scientific"), file="decay_kl"),
                ],
            ),
            Section(
                "Effect and side effect",
                "The KL is no effect: a random vector of the same length has one too, without the shift. Instability "
                "and the share against the mean are over texts.",
                tables=[effects_table(result)],
            ),
            Section(
                "After the dose: through the KV cache alone",
                "In the steps after the window the tokens are forced and the residual stream is left alone: what "
                "remains of the effect has come through the entries that were written under the dose.",
                figures=[
                    lines(
                        later,
                        "after",
                        "shift",
                        "curve",
                        title="Shift after the dose, in the model's own text",
                        x_label="steps after",
                        y_label="nats",
                        kind="signed",
                        low="low",
                        high="high",
                    )
                ],
                tables=[
                    Table(
                        result.half_lives,
                        "half-life",
                        columns=[
                            Column("source"),
                            Column("onset"),
                            Column("half_life", "half-life, steps", "decimal", bounds=("low", "high")),
                            Column("censored", "not reached"),
                        ],
                        file="half_lives",
                    )
                ],
            ),
            Section(
                "Free-running: what users see",
                "The model goes on by itself from the dose. Share of the target's tokens among the tokens that steered "
                "steps predict, over that of the plain model at the same steps; one sample a text.",
                tables=[
                    Table(
                        in_points(result.free, "excess"),
                        "target tokens",
                        columns=[
                            Column("arm"),
                            Column("onset"),
                            Column("excess", "over the plain model", "points", bounds=("excess_low", "excess_high")),
                            Column("plain", "plain model", "percent"),
                        ],
                        file="free",
                    )
                ],
            ),
            *_elsewhere(result),
            proof(result.checks),
        ],
        footer=footer(result.manifest),
    )


def _elsewhere(result: SteerDecayResult) -> list[Section]:
    """What was asked for beyond the predictions."""
    found = []
    if result.config.downstream is not None:
        features = ", ".join(map(str, result.config.downstream.features))
        columns = [
            Column("source"),
            Column("arm"),
            Column("onset"),
            Column("activation", "rise within the window", "signed", bounds=("low", "high")),
            Column("after", "in the steps after", "signed"),
            Column("plain", "plain model", "decimal"),
        ]
        text = f"Summed activation of the features {features} at a later layer, over the plain model's, token by token."
        table = Table(result.downstream, "features of a later layer", columns=columns, file="downstream")
        found.append(Section("Downstream", text, tables=[table]))
    if result.config.probe is not None:
        columns = [
            Column("arm"),
            Column("onset"),
            Column("fires", "probe fires, over the plain model", "points", bounds=("fires_low", "fires_high")),
            Column("plain", "plain model", "percent"),
            Column("score", "its score, over the plain model", "signed", bounds=("score_low", "score_high")),
        ]
        text = (
            f"`{result.config.probe}` was fitted on other texts. It scores the tokens that each arm wrote by itself in "
            "its window, read again without steering, so that it sees the text and not the vector."
        )
        table = Table(in_points(result.probe, "fires"), "probe on what was written", columns=columns, file="probe")
        found.append(Section("A held-out probe", text, tables=[table]))
        columns = [
            Column("arm"),
            Column("onset"),
            Column("shift", "log-odds of the target, over the plain model's text", "signed", bounds=("low", "high")),
            Column("plain", "after the plain model's text", "signed"),
        ]
        text = (
            "In the steps after the window, where the text that an arm wrote is read without steering: what has come "
            "through the text alone, as the section on the KV cache has what has come through the entries alone. The "
            "texts differ, so that this is much noisier."
        )
        table = Table(result.text, "through the text", columns=columns, file="text")
        found.append(Section("After the dose: through the text alone", text, tables=[table]))
    if result.judge is not None:
        columns = [
            Column("arm"),
            Column("onset"),
            _measure("score", "score, over the plain model", "signed"),
            Column("plain_score", "plain model", "decimal"),
            _measure("concept", "concept", "signed"),
            _measure("fluency", "fluency", "signed"),
            Column("score_texts", "texts with a score"),
            Column("asked", "answers"),
            Column("unread", "of these without a number"),
        ]
        text = (
            f"`{result.judge['model']}` was asked, for each text and without being told the arm, how much it is about "
            f'"{result.config.concept}", and how fluent it is, 0 to 2 each; the score is their harmonic mean.'
        )
        table = Table(result.judged, "a judge of what was written", columns=columns, file="judged")
        found.append(Section("A judge", text, tables=[table]))
    return found


def _decay_columns(kind: str = "signed") -> list[Column]:
    return [
        Column("what"),
        Column("slope", "slope per doubling", kind, bounds=("slope_low", "slope_high")),  # type: ignore[arg-type]
        Column("ratio", "last / first", "decimal", bounds=("ratio_low", "ratio_high")),
        Column("p", "p", "decimal"),
        Column("holm", "p, Holm", "decimal"),
        Column("families", "texts"),
    ]


def _measure(name: str, header: str, kind: str) -> Column:
    return Column(name, header, kind, bounds=(f"{name}_low", f"{name}_high"))  # type: ignore[arg-type]


def _with_ends(row: pd.Series, name: str, kind: str) -> str:
    ends = format_interval(row[f"{name}_low"], row[f"{name}_high"], kind)  # type: ignore[arg-type]
    number = format_number(row[name], kind)  # type: ignore[arg-type]
    return f"{number} {ends}" if not pd.isna(row[f"{name}_low"]) else number
