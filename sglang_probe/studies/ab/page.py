"""The report of a paired experiment."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import Figure, grouped_bars, lines, token_strip
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Kind, Table, format_number
from sglang_probe.run.hook_points import EMBED
from sglang_probe.studies.ab.study import BIN, PairResult


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
    floors = result.floors[result.floors["hook_point"] != EMBED]
    deepest = floors[floors["hook_point"] == floors["hook_point"].iloc[-1]] if len(floors) else floors
    text = (
        "For positions that both runs computed: the distance of their captured rows, relative to the row's norm. An "
        "effect means something only beside the floor, the distance of an arm to its own further runs in the same "
        "session, which submit the requests in another order. Effects are taken within a replicate, so that both "
        f"sides served the requests in one order; the baseline is `{result.baseline}`. Intervals are 95 % cluster "
        "bootstrap intervals over prefix families; with fewer than six families there are none."
    )
    return Section(
        heading="Drift: the same token, computed under another policy",
        text=text,
        figures=[*_effects(deepest), *_by_bin(result)],
        tables=[
            Table(_floor_columns(result.floors), "Effect over floor, mean relative L2", _floor_formats()),
            Table(_floor_columns(result.by_class, "segment"), "By class of token", _floor_formats()),
            Table(
                result.drift[[*columns, "cosine_min", "deviation_max"]].sort_values(["hook_point", "phase", "kind"]),
                "Every comparison",
                {"identical": "percent", "l2_median": "scientific", "l2_p99": "scientific", "l2_max": "scientific"},
            ),
            *([Table(result.flips, "Where outputs part")] if len(result.flips) else []),
        ],
        notes=[] if result.floors["floor"].notna().any() else ["No floor was measured, so no effect can be claimed."],
    )


def _effects(floors: pd.DataFrame) -> list[Figure]:
    """Effect and floor of every arm at the deepest hook point, one figure a phase."""
    figures = []
    for phase, part in floors.groupby("phase", sort=False):
        long = pd.concat(
            [
                pd.DataFrame({"arm": part["arm"], "what": what, "l2": part[what], "low": part[low], "high": part[high]})
                for what, low, high in (("effect", "effect_low", "effect_high"), ("floor", "floor_low", "floor_high"))
            ]
        )
        whiskers = long["low"].notna().all()
        figures.append(
            grouped_bars(
                long if whiskers else long.drop(columns=["low", "high"]),
                "arm",
                "what",
                "l2",
                title=f"{part['hook_point'].iloc[0]}, {phase}: effect beside floor",
                kind="scientific",
                low="low" if whiskers else None,
                high="high" if whiskers else None,
                caption="Mean relative L2 against the baseline, and of runs of the same arm against each other.",
            )
        )
    return figures


def _by_bin(result: PairResult) -> list[Figure]:
    """How much effect exceeds floor along the sequence, per arm, at the deepest hook point."""
    frame = result.by_bin
    if frame.empty or frame["excess"].isna().all():
        return []
    frame = frame[(frame["hook_point"] == frame["hook_point"].iloc[-1]) & frame["excess"].notna()]
    weighted = frame.assign(total=frame["excess"] * frame["positions"])
    sums = weighted.groupby(["arm", "start"], sort=False, as_index=False)[["total", "positions"]].sum()
    sums["excess"] = sums["total"] / sums["positions"]
    return [
        lines(
            sums.sort_values(["arm", "start"]),
            "start",
            "excess",
            "arm",
            title=f"{frame['hook_point'].iloc[0]}: effect minus floor, by position",
            x_label=f"position (start of bin of {BIN})",
            y_label="relative L2",
            kind="scientific",
            caption="Below zero, two runs of one arm differ more than the arms do: submission order, not the policy.",
        )
    ]


def _floor_columns(floors: pd.DataFrame, *by: str) -> pd.DataFrame:
    """What a reader needs of a floor table."""
    columns = ["arm", "hook_point", "phase", *by, "positions", "identical_effect", "identical_floor", "effect", "floor"]
    columns += ["excess_low", "excess_high", "q", "verdict"]
    return floors[columns] if len(floors) else floors


def _floor_formats() -> dict[str, Kind]:
    scientific: dict[str, Kind] = dict.fromkeys(["effect", "floor", "excess_low", "excess_high"], "scientific")
    return scientific | {"identical_effect": "percent", "identical_floor": "percent"}


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
    """Resolved server arguments in which the arms differ, and what was set in the running engine."""
    resolved = {
        n: {
            **m.get("server_resolved", {}),
            **(m.get("switches") or {}),
            "cache": (m.get("policy") or {}).get("cache"),
            "partners": m.get("partners"),
        }
        for n, m in result.manifests.items()
    }
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
