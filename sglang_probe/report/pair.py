"""The report of a paired experiment."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import grouped_bars, lines, token_strip
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Kind, Table, format_number
from sglang_probe.study.pair import EFFECT, FLOOR, PairResult


def pair_page(result: PairResult) -> Page:
    """The page of one experiment: what was computed, what was not, and how far the common rows differ."""
    first, last = _arms(result)[0], _arms(result)[-1]
    return Page(
        title=f"What the engine computed: {result.name}",
        lead=_lead(result, first, last),
        tiles=_tiles(result, first),
        facts=_facts(result),
        sections=[_coverage(result, first), _tokens(result), _drift(result), _proof(result), _arguments(result)],
        footer=f"sglang-probe {_manifest(result)['versions']['sglang-probe']}. Every number was measured in the runs "
        "listed here; a reused position is one whose forward pass SGLang skipped.",
    )


def _arms(result: PairResult) -> list[str]:
    return list(dict.fromkeys(result.totals["arm"]))


def _manifest(result: PairResult) -> dict[str, Any]:
    return next(iter(result.manifests.values()))


def _row(result: PairResult, run: str) -> dict[str, Any]:
    return dict(result.totals.set_index("run").loc[run])


def _coverage_of(result: PairResult, arm: str, segment: str) -> float:
    frame = result.by_segment
    values = frame[(frame["arm"] == arm) & (frame["segment"] == segment)]["coverage"]
    return float(values.iloc[0]) if len(values) else float("nan")


def _lead(result: PairResult, first: str, last: str) -> str:
    frame = result.by_segment[(result.by_segment["arm"] == first) & (result.by_segment["segment"] != "all")]
    worst = frame.loc[frame["coverage"].idxmin()]
    overall = _coverage_of(result, first, "all")
    return (
        f"The same {int(_row(result, first)['requests'])} requests with the same output tokens under "
        f"{len(_arms(result))} policies. Under `{first}` the engine computed {format_number(overall, 'percent')} of "
        f"the prompt tokens; the others came from the cache and have no row. Worst covered: `{worst['segment']}`, at "
        f"{format_number(float(worst['coverage']), 'percent')}. Under `{last}` it computed "
        f"{format_number(_coverage_of(result, last, 'all'), 'percent')}."
    )


def _tiles(result: PairResult, first: str) -> list[Tile]:
    row = _row(result, first)
    reconciled = int(result.totals["requests_reconciled"].sum())
    requests = int(result.totals["requests"].sum())
    rows = [c for checks in result.checks.values() for c in checks if c.name == "content"]
    tiles = [
        Tile(
            "forward passes skipped",
            format_number(int(row["reused"])),
            f"prompt tokens of {format_number(int(row['prompt_tokens']))} in `{first}` came from the prefix cache",
        ),
        Tile("reconciled", f"{reconciled} / {requests}", "requests whose reused count equals SGLang's `cached_tokens`"),
    ]
    if rows:
        proved = sum(c.covered for c in rows if c.holds)
        tiles.append(
            Tile(
                "rows proved",
                format_number(proved),
                "captured rows whose embedding equals `embed(token_id)` bit for bit",
            )
        )
    return tiles


def _facts(result: PairResult) -> list[tuple[str, str]]:
    m = _manifest(result)
    v = m["versions"]
    model = m["model"]
    return [
        ("model", f"{model['name']} ({model['architecture']}, {model['layers']} layers), rows in {m['rows_dtype']}"),
        ("engine", f"SGLang {v['sglang']}, torch {v['torch']}"),
        ("attention backend", str(m.get("server_resolved", {}).get("attention_backend"))),
        (
            "workload",
            f"{m['workload']['source']}, {m['requests_expected']} requests, digest {m['workload_digest'][:12]}",
        ),
        ("concurrency", str(m["concurrency"])),
        ("recorded", m["created"]),
    ]


def _coverage(result: PairResult, first: str) -> Section:
    by_position = result.by_position.assign(position=result.by_position["start"])
    return Section(
        heading="Coverage: which prompt tokens were computed",
        text="Coverage is the computed share of prompt positions. A position that is not computed was served from the "
        "prefix cache: it has a key and a value, and no activation. Classes come from the workload's segments; "
        "`template` and `special` are tokens that the chat template wrote.",
        figures=[
            grouped_bars(
                result.by_segment,
                "segment",
                "arm",
                "coverage",
                title="Coverage by segment class",
                kind="percent",
                caption="Share of prompt positions in traffic that the engine computed. A prefix computed once "
                "and reused eleven times has a coverage of 8 %: one row stands for twelve occurrences.",
            ),
            lines(
                by_position,
                "position",
                "coverage",
                "arm",
                title="Coverage by position in the prompt",
                x_label="position (start of bin of 32)",
                y_label="computed share",
                kind="percent",
                step=True,
                caption="Shared prefixes sit at the front, so a cached harvest under-samples the early positions.",
            ),
            token_strip(
                result.example["strips"],
                result.example["segments"],
                title=f"One request ({result.example['rid']}), position by position",
                caption=f"The request with the most reused tokens under {first}.",
            ),
        ],
        tables=[
            Table(result.by_segment[["arm", "segment", "positions", "computed", "reused", "coverage"]], "By segment")
        ],
    )


def _tokens(result: PairResult) -> Section:
    columns = [
        "run",
        "requests",
        "prompt_tokens",
        "computed",
        "reused",
        "generated",
        "decode_steps",
        "overshoot",
        "recomputed",
        "sglang_cached_tokens",
        "requests_reconciled",
        "seconds",
        "tokens_per_second",
    ]
    return Section(
        heading="Tokens and time",
        text="`generated` counts sampled tokens. The last one of each request has no KV entry, so there are fewer "
        "`decode_steps`; an `overshoot` is a step that overlap scheduling computed after a request had stopped. Wall "
        "time is from the first request to the last answer, without the engine's start, with rows being captured.",
        tables=[Table(result.totals[columns], "Per run")],
        notes=["One run each on a shared machine: the times show an order of magnitude, not a benchmark."],
    )


def _drift(result: PairResult) -> Section:
    columns = ["comparison", "kind", "hook_point", "phase", "positions", "identical", "l2_median", "l2_p99", "l2_max"]
    effect = result.drift_by_position.assign(
        series=result.drift_by_position["hook_point"] + " (" + result.drift_by_position["kind"] + ")"
    )
    effect = effect[effect["hook_point"] != "hook_embed"]
    # One curve per hook point and kind: the largest over the comparisons of that kind.
    curves = effect.groupby(["series", "start"], as_index=False)["l2_p99"].max()
    has_floor = (result.drift["kind"] == FLOOR).any()
    return Section(
        heading="Drift: the same token, computed under another policy",
        text="For positions that both runs computed: the distance of their captured rows, relative to the row's norm. "
        "Output tokens were forced to be the same, through the real decode path. An effect means something only "
        "beside the floor, the distance of an arm to its own second run in the same session. The second run submits "
        "the requests in another order, so the floor includes what batch composition alone does.",
        figures=[
            lines(
                curves,
                "start",
                "l2_p99",
                "series",
                title="Relative L2 by position, 99th percentile",
                x_label="position (start of bin of 32)",
                y_label="relative L2",
                kind="scientific",
                caption="Zero means bit-identical in 99 of 100 positions.",
            )
        ],
        tables=[
            Table(
                result.drift_summary(),
                "Effect beside floor (worst over the comparisons of each kind)",
                _formats(result),
            ),
            Table(
                result.drift[[*columns, "cosine_min"]].sort_values(["hook_point", "phase", "kind"]),
                "Every comparison",
                {"identical": "percent", "l2_median": "scientific", "l2_p99": "scientific", "l2_max": "scientific"},
            ),
        ],
        notes=[] if has_floor else [f"No {FLOOR} was measured (`repeat: false`), so no {EFFECT} can be claimed."],
    )


def _formats(result: PairResult) -> dict[str, Kind]:
    columns = [str(c) for c in result.drift_summary().columns]
    kinds: dict[str, Kind] = {c: "scientific" for c in columns if " l2_" in c}
    return kinds | {c: "percent" for c in columns if c.endswith("identical")}


def _proof(result: PairResult) -> Section:
    rows = [
        {
            "run": n,
            "check": c.name,
            "claim": c.claim,
            "covered": f"{c.covered:,} {c.unit}",
            "result": c.violation or "holds",
        }
        for n, checks in result.checks.items()
        for c in checks
    ]
    return Section(
        heading="Why to believe it",
        text="The invariants of the ledger, checked on the files after each run. `sglang-probe verify RUN` repeats "
        "them on any machine, without SGLang.",
        tables=[Table(pd.DataFrame(rows), "Checks")],
        notes=[] if result.ok else ["**At least one invariant is violated. Do not use these numbers.**"],
    )


def _arguments(result: PairResult) -> Section:
    """Resolved server arguments in which the arms differ."""
    resolved = {n: m.get("server_resolved", {}) for n, m in result.manifests.items()}
    names = sorted({k for args in resolved.values() for k in args})
    volatile = {"port", "nccl_port", "_launch_command", "random_seed_offset"}
    rows = [
        {"argument": k, **{n: str(args.get(k)) for n, args in resolved.items()}}
        for k in names
        if k not in volatile and len({str(args.get(k)) for args in resolved.values()}) > 1
    ]
    frame = pd.DataFrame(rows, columns=["argument", *resolved])
    return Section(
        heading="How the arms differ",
        text="Every resolved server argument that is not the same in all runs.",
        tables=[Table(frame, "Server arguments")],
    )
