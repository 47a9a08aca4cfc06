"""The report of a reconstruction gap."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, dots
from sglang_probe.report.numbers import format_interval, format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import facts, footer, only, proof
from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_gap.runs import MEAN, RANDOM, SPLICED, ZERO
from sglang_probe.studies.sae_gap.study import GapResult

KINDS = {HUMAN: "human text", REFORWARD: "own text, prefilled", DECODED: "own text, decoded"}
REPLACED = {SPLICED: "its reconstruction", RANDOM: "a random error as long", MEAN: "the mean row", ZERO: "zero"}
BOTH = "numerics and content"
_GAP = Column("gap", "gap, 95 %", "points", bounds=("gap_low", "gap_high"))
_TIMES = Column(
    "times_random", "times random errors, 95 %", "decimal", bounds=("times_random_low", "times_random_high")
)
_NONE = "no kind of run was replaced (`spliced`)"


def answer(result: GapResult) -> str:
    """What was found, in a sentence or two."""
    fvu = {k: _first(only(result.arms, kind=k), "fvu") for k in KINDS}
    both = _in_points(only(result.gaps, contrast=BOTH, texts="all"))
    text = (
        f"`{result.sae['folder']}` leaves {format_number(fvu[HUMAN], 'percent')} of the variance of human text "
        f"unexplained and {format_number(fvu[DECODED], 'percent')} of what the model decodes: a gap of "
        f"{_points(both, 'gap')} points, of which {_points(both, 'within')} lie within bands of entropy."
    )
    kl = only(result.effects, replaced_by=SPLICED)
    for _, row in kl.iterrows():
        cost, times = (format_number(row[n], "decimal") for n in ("kl", "times_random"))
        where = KINDS.get(row["kind"], row["kind"])
        text += f" Spliced into {where}, its errors cost {cost} nats, {times} times what random errors as long cost."
    return text


def _first(frame: pd.DataFrame, column: str) -> object:
    return frame[column].iloc[0] if len(frame) and column in frame else None


def _points(frame: pd.DataFrame, name: str) -> str:
    found = format_number(_first(frame, name), "points")
    return f"{found} {format_interval(_first(frame, f'{name}_low'), _first(frame, f'{name}_high'), 'points')}"


def arms_table(result: GapResult) -> Table:
    """By kind of row."""
    columns = [
        Column("kind"),
        Column("fvu", "unexplained, 95 % (of its own variance)", "percent", "fvu_own", ("fvu_low", "fvu_high")),
        Column("relative_error", "error / norm² (median)", "percent"),
        Column("l0", "L0", "average"),
        Column("entropy", "entropy, nats", "decimal"),
        Column("nll", "cross-entropy, nats", "decimal"),
        Column("distinct_2", "distinct 2-grams", "percent"),
        Column("repeated_8", "repeated 8-grams (loops)", "percent"),
        Column("loops"),
        Column("rows"),
    ]
    return Table(_named(result.arms), "By kind of row", columns=columns, file="arms")


def gaps_table(result: GapResult) -> Table:
    """The gaps and their two parts."""
    columns = [
        Column("contrast"),
        Column("texts"),
        _GAP,
        Column("within", "within bands of entropy, 95 %", "points", bounds=("within_low", "within_high")),
        Column("composition", "mixture of bands, 95 %", "points", bounds=("composition_low", "composition_high")),
        Column("floor", "floor: recorded twice", "scientific"),
        Column("n", "number of texts"),
    ]
    return Table(_in_points(result.gaps), "Gaps, in points of the variance of human rows", columns=columns, file="gaps")


def effects_table(result: GapResult) -> Table:
    """What replacing rows does."""
    columns = [
        Column("kind"),
        Column("replaced_by"),
        Column("nll", "cross-entropy (clean), nats", "decimal", "clean"),
        Column("kl", "KL from the clean prediction, nats, 95 %", "decimal", bounds=("kl_low", "kl_high")),
        Column(
            "times_random", "times random errors, 95 %", "decimal", bounds=("times_random_low", "times_random_high")
        ),
        _share("recovered_mean", "cross-entropy recovered, against the mean row"),
        _share("recovered_zero", "against zero"),
        _share("kl_score_mean", "KL recovered, against the mean row"),
    ]
    frame = _named(result.effects)
    if len(frame):
        frame = frame.assign(replaced_by=frame["replaced_by"].map(lambda v: REPLACED.get(v, v)))
    return Table(frame, "Rows of the continuation replaced", columns=columns, file="effects")


def _share(name: str, header: str) -> Column:
    return Column(name, f"{header}, 95 %", "percent", bounds=(f"{name}_low", f"{name}_high"))


def gap_page(result: GapResult) -> Page:
    """The page of one study."""
    both = _in_points(only(result.gaps, contrast=BOTH, texts="all"))
    cost = only(result.effects, replaced_by=SPLICED, kind=DECODED)
    return Page(
        title=f"Reconstruction from human text to decoding: {result.name}",
        answer=answer(result),
        picture=_picture(result),
        tiles=[
            Tile("gap", format_number(_first(both, "gap"), "points"), "decoded minus human, of one variance"),
            Tile("within bands", format_number(_first(both, "within"), "points"), "at equal entropy"),
            Tile("cost while decoding", format_number(_first(cost, "kl"), "decimal"), "KL in nats of its errors"),
            Tile("against random", format_number(_first(cost, "times_random"), "decimal"), "times errors as long"),
        ],
        lead="Each text is cut to a prompt and a continuation, which was computed three times: as human text "
        "prefilled, as the model's own text decoded, and as that text prefilled again. Every row used was "
        "computed by its run and is under no intervention.",
        facts=facts(
            result.manifest,
            ("hook point", str(result.sae["hook_point"])),
            ("SAE", f"{result.sae['latents']} latents, weights {str(result.sae['weights_sha256'])[:16]}"),
            ("temperature", str(result.temperature)),
            ("variance of human rows", format_number(result.variance)),
            ("rows left out as sinks", format_number(result.sinks)),
        ),
        sections=[
            Section(
                "The gap and what it is made of",
                "**Content** compares another text on the same path, **numerics** the same text on another path; they "
                "sum to **numerics and content**. The gap is split by quartiles of the entropy of human rows (Kitagawa "
                "1955): what differs within bands, and what is another mixture of bands. A text of whose 8-grams more "
                "than a quarter occurred in it before is a loop. Intervals are over texts.",
                tables=[gaps_table(result), arms_table(result)],
            ),
            Section(
                "By depth, position and entropy",
                "Step 1 is the first generated token as input. A window of one step has one row for each text.",
                figures=_depth_figure(result),
                tables=[
                    _by_table(result.by_depth, "window", "By depth of generation", "by_depth"),
                    _by_table(result.by_position, "position", "By absolute position", "by_position"),
                    _by_table(result.by_band, "band", "By band of entropy, nats", "by_band", "scale"),
                ],
            ),
            Section(
                "What its errors do",
                "The residual stream after the layer is replaced over the continuation, in the engine, in the phase at "
                "hand: while decoding with the same tokens forced. Random errors have, row by row, the length of the "
                "SAE's own. Recovered: 0 % is the mean row (or zero) in place of every row, 100 % the clean model.",
                tables=[effects_table(result), _effects_by(result)],
                nothing=_NONE,
            ),
            proof(result.checks),
        ],
        footer=footer(result.manifest),
    )


def _picture(result: GapResult) -> Figure:
    return dots(
        _named(result.arms).assign(sae=str(result.sae["folder"])),
        "kind",
        "sae",
        "fvu",
        low="fvu_low",
        high="fvu_high",
        kind="percent",
        title="Unexplained share by kind of row",
        caption="Of the variance of human rows. Lines are 95 % intervals over texts: a gap is paired, and far surer.",
        x_label="unexplained",
    )


def _depth_figure(result: GapResult) -> list[Figure]:
    frame = _in_points(only(result.by_depth, contrast=BOTH))
    if frame.empty or "gap" not in frame:
        return []
    return [
        dots(
            frame[frame["gap"].notna()].assign(series="decoded minus human"),
            "window",
            "series",
            "gap",
            low="gap_low",
            high="gap_high",
            kind="points",
            title="Gap by depth of generation",
            caption="Lines are 95 % intervals over texts.",
            x_label="points of the variance of human rows",
        )
    ]


def _by_table(frame: pd.DataFrame, axis: str, title: str, file: str, *more: str) -> Table:
    columns = [
        *(Column(m) for m in more),
        Column(axis),
        Column("contrast"),
        Column("fvu_first", "unexplained before", "percent"),
        Column("fvu_second", "after", "percent"),
        _GAP,
        *([Column("share_first", "share of rows before (after)", "percent", "share_second")] if more else []),
        Column("texts"),
    ]
    return Table(_in_points(frame), title, columns=columns, long=True, file=file)


def _effects_by(result: GapResult) -> Table:
    columns = [
        Column("axis"),
        Column("group"),
        Column("kind"),
        Column("kl", "KL, nats, 95 %", "decimal", bounds=("kl_low", "kl_high")),
        Column("kl_random", "of random errors", "decimal"),
        _TIMES,
        Column("rows"),
    ]
    return Table(_named(result.effects_by), "KL by depth and entropy", columns=columns, long=True, file="effects_by")


def _in_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Gaps as percentage points; the tables' files have shares."""
    names = [f"{n}{end}" for n in ("gap", "within", "composition") for end in ("", "_low", "_high")]
    return frame.assign(**{n: 100 * frame[n] for n in names if n in frame})


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(kind=frame["kind"].map(lambda k: KINDS.get(k, k))) if len(frame) else frame
