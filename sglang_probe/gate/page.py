"""The page of a gate: the verdict, each path beside its floor, what a wrong entry would do, how it was asked."""

from __future__ import annotations

import pandas as pd

from sglang_probe.gate.arms import MEANS, WRONG
from sglang_probe.gate.gate import Result
from sglang_probe.gate.judge import FACTOR
from sglang_probe.gate.verdict import Verdict
from sglang_probe.report.figures import Figure, dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table

MEANING = {
    Verdict.EQUAL: "Reuse changes nothing here, to the last bit.",
    Verdict.WITHIN_FLOOR: "Reuse changes no more than repeating, company and the shapes of batches do.",
    Verdict.CHANGES: "Reuse changes log-probabilities or tokens by more than the rest does, by the size of rounding.",
    Verdict.WRONG: "Some reused entries are not what their tokens would have been computed to.",
    Verdict.INCONCLUSIVE: "Nothing can be said; the reasons are below.",
}
PATHS = {
    "branch": "after another request with the same prefix and another tail",
    "repeat": "the same request once more",
    "staged": "after its prefix was computed in three requests, each a part longer",
    "turns": "a further turn: the answer of the turn before is reused too",
    "company": "as branch, several at a time",
    "cancelled": "in company, after and among requests that were cancelled in the middle",
}


def paths_table(result: Result) -> Table:
    """One row a path, also for the terminal."""
    columns = [
        Column("path"),
        Column("effect", "mean |difference|, nats", "scientific"),
        Column("floor", "floor", "scientific"),
        Column("yardstick", "yardstick", "scientific"),
        Column("most", "largest", "scientific"),
        Column("flips", "greedy flips (floor)", "percent", beside="floor_flips"),
        Column("parted", "first at token", "integer"),
        Column("equal", "equal to the last bit", "integer"),
        Column("cases", kind="integer"),
        Column("positions", kind="integer"),
        Column("p_moved", "p, moved", "decimal"),
        Column("p_flips", "p, flips", "decimal"),
    ]
    return Table(result.judgement.paths, "Warm against cold, by path", columns=columns, file="paths")


def failures_told(result: Result, most: int = 5) -> list[str]:
    """The first requests that got no answer, and how many more there are."""
    failures = result.sent.failures
    more = len(failures) - most
    return [*failures[:most], *([f"{more:,} further requests got no answer"] if more > 0 else [])]


def gate_page(result: Result) -> Page:
    """The whole page."""
    j = result.judgement
    return Page(
        title=f"Is reuse right on this server? {j.verdict.value}",
        answer=j.sentence,
        picture=_figure(j.paths),
        lead="The same requests were sent cold, warm, and cold again, greedily and with log-probabilities, to "
        f"`{result.url}`. A warm request reuses what an earlier one computed for the same tokens; a cold one computes "
        f"everything. {MEANING[j.verdict]}",
        tiles=_tiles(result),
        facts=_facts(result),
        sections=[
            Section("By path", _paths_text(), tables=[paths_table(result)], notes=list(j.reasons)),
            Section("Wrong answers", _WRONG, tables=[_wrong_table(result)], nothing="no answer is"),
            Section("What would have been seen", _SEEN, tables=[_seen_table(result)], nothing="no control was asked"),
            Section("Every case", tables=[_cases_table(result)], notes=failures_told(result)),
            Section("How it was asked", _how(result)),
        ],
    )


def _tiles(result: Result) -> list[Tile]:
    j = result.judgement
    equal, n = (int(j.paths[c].sum()) for c in ("equal", "cases"))
    return [
        Tile("verdict", j.verdict.value, f"exit code {j.verdict.exit_code}"),
        Tile("equal to the last bit", f"{equal} of {n}", "comparisons of a warm request with its cold ones"),
        Tile("wrong", str(len(j.wrong)), "warm answers past what rounding can do"),
        Tile("largest difference", _nats(j.paths["most"].max()), "of one log-probability, warm against cold"),
        Tile(
            "cold against cold",
            _nats(j.yardstick),
            "largest median of a case, odd ones aside; other order, company, length",
        ),
        Tile("one wrong token", _share(j.seen.get(1)), "of the cases would show it past the threshold"),
    ]


def _figure(paths: pd.DataFrame) -> Figure:
    kinds = (
        ("effect", "warm against cold"),
        ("floor", "floor: same arm, other order"),
        ("yardstick", "yardstick: cold"),
    )
    data = pd.concat([paths.assign(value=paths[c], of=name)[["path", "of", "value"]] for c, name in kinds])
    return dots(
        data,
        "path",
        "of",
        "value",
        title="Mean |difference of log-probabilities|",
        caption="Nats per token. The floor pairs requests of one arm under the same change of order; the yardstick "
        "pairs cold requests alone, in company, and with more tokens after.",
        kind="scientific",
        x_label="nats",
    )


def _facts(result: Result) -> list[tuple[str, str]]:
    f = result.facts
    told: list[tuple[str, object]] = [
        ("server", result.url),
        ("model", f.model),
        ("SGLang", f.version),
        ("dtype", f.dtype),
    ]
    told += [("page size", f.page_size), ("chunked prefill", f.chunk)]
    told += [(k.replace("_", " "), v) for k, v in f.further.items()]
    told += [("cold by", result.cold), ("prompts", str(result.config.prompts or "built in"))]
    told += [("requests", f"{result.requests:,} in {result.seconds:.0f} s"), ("seed", result.config.seed)]
    return [(name, str(value)) for name, value in told if value is not None]


def _paths_text() -> str:
    return "\n\n".join(f"**{name}**: {what}." for name, what in PATHS.items()) + (
        "\n\nThe effect pairs cold of one order with warm of the other; the floor pairs cold with cold and warm with "
        "warm across the same two orders. p: that the effect is no larger than floor and yardstick, and that flips are "
        "no more frequent; all paths and both measures are judged together (Holm, 5 %)."
    )


_WRONG = (
    "A warm answer is wrong if the median difference to both of its cold answers, over all tokens from the border of "
    "reuse on, passes the threshold. The origin is known where the server records with this package's plugin."
)
_SEEN = (
    "The same tails were asked cold after prefixes in which tokens had been replaced by others: what wrong entries "
    "would do on this model and these prompts. Where the share is low, a single wrong entry could pass unseen."
)


def _wrong_table(result: Result) -> Table:
    rows = [
        {
            "path": w.arm,
            "case": result.cases[w.case].name,
            "moved": w.moved,
            "border": w.border,
            "parted": w.parted,
            "origin": "; ".join(w.origin[:4]) or "not known",
        }
        for w in result.judgement.wrong
    ]
    columns = [
        Column("path"),
        Column("case"),
        Column("moved", "median |difference|, nats", "scientific"),
        Column("border", "reused tokens", "integer"),
        Column("parted", "first other token", "integer"),
        Column("origin", "reused from request [start, end)"),
    ]
    frame = pd.DataFrame(rows, columns=[c.name for c in columns])
    return Table(frame, "Answers that reuse made wrong", columns=columns, file="wrong")


def _seen_table(result: Result) -> Table:
    j = result.judgement
    rows = [{"wrong": n, "share": j.seen[n], "threshold": j.threshold} for n in WRONG if j.seen.get(n) == j.seen.get(n)]
    columns = [
        Column("wrong", "wrong tokens in the prefix", "integer"),
        Column("share", "cases in which they would be seen", "percent"),
        Column("threshold", "threshold, nats", "scientific"),
    ]
    return Table(pd.DataFrame(rows, columns=[c.name for c in columns]), "Controls", columns=columns, file="controls")


def _cases_table(result: Result) -> Table:
    columns = [
        Column("path"),
        Column("case"),
        Column("left_out", "left out because"),
        Column("effect", "mean |difference|", "scientific"),
        Column("floor", "floor", "scientific"),
        Column("yardstick", "yardstick", "scientific"),
        Column("most", "largest", "scientific"),
        Column("parted", "first other token", "integer"),
        Column("cached", "cached tokens", "integer"),
    ]
    return Table(result.judgement.cases, "All cases", columns=columns, long=True, file="cases")


def _how(result: Result) -> str:
    chunk, longest = result.facts.chunk, max((len(c.prompt) for c in result.cases), default=0)
    cut = ""
    if chunk and chunk > 0:
        cut = (
            f"Prompts of up to {longest:,} tokens were cut into chunks of {chunk:,}."
            if longest > chunk
            else f"No prompt was cut: chunks have {chunk:,} tokens, prompts up to {longest:,} (`--tokens` makes them "
            "longer)."
        )
    return (
        f"Cold: {MEANS[result.cold]}.\n\n"
        f"The threshold is {FACTOR:g} times the largest median difference between two cold requests of one case, odd "
        f"ones aside, and "
        f"at least what rounding in {result.facts.dtype or 'an unknown dtype'} may do: "
        f"{result.judgement.threshold:.3g} nats. A case whose own cold answers are further apart has {FACTOR:g} times "
        f"that.\n\n{cut}"
    )


def _nats(x: float) -> str:
    return f"{format_number(x, 'scientific')} nats" if x == x else "none"


def _share(x: float | None) -> str:
    return format_number(x, "percent") if x is not None and x == x else "none"
