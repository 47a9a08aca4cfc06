"""The report of an experiment with several arms."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import Figure, grouped_bars, lines, token_strip
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Table, format_number
from sglang_probe.run.hook_points import EMBED
from sglang_probe.studies.ab.study import BIN, AbResult
from sglang_probe.studies.ab.tables import (
    arms_of,
    counts_table,
    coverage_table,
    effects_table,
    every_comparison,
    every_effect,
    flips_table,
    tokens_table,
)
from sglang_probe.studies.floor import ALARM
from sglang_probe.studies.pages import ALARMED, FLOOR, facts, footer, proof

_SHARED_PREFIX = "shared_prefix"


def ab_page(result: AbResult) -> Page:
    """The page of one experiment: what was computed, what was not, and how far the common rows differ."""
    first, last = arms_of(result)[0], arms_of(result)[-1]
    m = _manifest(result)
    workload = f"{m['workload']['source']}, {m['requests_expected']} requests, digest {m['workload_digest'][:12]}"
    backend = str(m.get("server_resolved", {}).get("attention_backend"))
    return Page(
        title=f"What the engine computed: {result.name}",
        lead=_lead(result, first, last),
        tiles=_tiles(result, first),
        facts=facts(
            m, ("attention backend", backend), ("workload", workload), ("requests in flight", str(m["concurrency"]))
        ),
        sections=[
            _coverage(result, first),
            _drift(result),
            _tokens(result),
            proof(result.checks, f"{result.reconciled} {_proved(result)}"),
            _arguments(result),
        ],
        footer=footer(
            m,
            "Every number was measured in the runs named here; a reused position is one whose forward pass SGLang "
            "skipped.",
        ),
    )


def _manifest(result: AbResult) -> dict[str, Any]:
    return next(iter(result.manifests.values()))


def _row(result: AbResult, run: str) -> dict[str, Any]:
    return dict(result.totals.set_index("run").loc[run])


def _coverage_of(result: AbResult, arm: str, segment: str) -> float:
    frame = result.by_segment
    values = frame[(frame["arm"] == arm) & (frame["segment"] == segment)]["coverage"]
    return float(values.iloc[0]) if len(values) else float("nan")


def _worst(result: AbResult, arm: str) -> dict[str, Any]:
    """The segment of the prompt with the least coverage."""
    frame = result.by_segment[(result.by_segment["arm"] == arm) & (result.by_segment["segment"] != "all")]
    return dict(frame.loc[frame["coverage"].idxmin()])


def _lead(result: AbResult, first: str, last: str) -> str:
    worst, overall = _worst(result, first), _coverage_of(result, first, "all")
    return (
        f"The same {int(_row(result, first)['requests'])} requests with the same output tokens under "
        f"{len(arms_of(result))} policies. Under `{first}` the engine computed {format_number(overall, 'percent')} of "
        f"the prompt tokens; the others came from the cache and have no row. Worst covered: `{worst['segment']}`, at "
        f"{format_number(worst['coverage'], 'percent')}. Under `{last}` it computed "
        f"{format_number(_coverage_of(result, last, 'all'), 'percent')}."
    )


def _tiles(result: AbResult, first: str) -> list[Tile]:
    row, worst = _row(result, first), _worst(result, first)
    prompt = format_number(int(row["prompt_tokens"]))
    tiles = [
        Tile(
            "positions not computed",
            format_number(int(row["reused"])),
            f"of {prompt} prompt positions in `{first}`: they came from the prefix cache and have no row",
        ),
        Tile(
            "least covered",
            format_number(worst["coverage"], "percent"),
            f"of the `{worst['segment']}` positions were computed in `{first}`",
        ),
    ]
    if len(result.floors):
        deepest = result.floors[result.floors["hook_point"] == result.floors["hook_point"].iloc[-1]]
        r = dict(deepest.loc[deepest["effect"].idxmax()])
        floor = format_number(r["floor"], "scientific", digits=1)
        tiles.append(
            Tile(
                "largest effect",
                format_number(r["effect"], "scientific", digits=1),
                f"relative L2 of `{r['arm']}` against `{result.baseline}` in {r['phase']}, floor {floor}: "
                f"{r['verdict']}",
            )
        )
    return tiles


def _coverage(result: AbResult, first: str) -> Section:
    by_position = result.by_position.assign(position=result.by_position["start"])
    shared = _manifest(result)["workload"]["source"] == _SHARED_PREFIX
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
                caption="Share of prompt positions in traffic that the engine computed. For example, a prefix that is "
                "computed once and reused eleven times has a coverage of 8.3%: one row stands for twelve occurrences.",
            ),
            lines(
                by_position,
                "position",
                "coverage",
                "arm",
                title="Coverage by position in the prompt",
                x_label=f"position (start of bin of {BIN})",
                y_label="computed share",
                kind="percent",
                step=True,
                caption="This workload's shared prefixes are at the front, so that a cached harvest under-samples "
                "early positions."
                if shared
                else "",
            ),
            token_strip(
                result.example["strips"],
                result.example["segments"],
                title=f"One request ({result.example['rid']}), position by position",
                caption=f"The request with the most reused tokens under {first}.",
            ),
        ],
        tables=[coverage_table(result)],
    )


def _tokens(result: AbResult) -> Section:
    return Section(
        heading="Tokens and time",
        text="`generated` counts sampled tokens. The last one of each request has no KV entry, so there are fewer "
        "decode steps; an overshoot is a step that overlap scheduling computed after a request had stopped. Wall "
        "time is from the first request to the last answer, without the engine's start, with rows being captured.",
        tables=[tokens_table(result), counts_table(result)],
        notes=["Each run was timed once: the times show an order of magnitude, not a benchmark."],
    )


def _drift(result: AbResult) -> Section:
    floors = result.floors[result.floors["hook_point"] != EMBED] if len(result.floors) else result.floors
    deepest = floors[floors["hook_point"] == floors["hook_point"].iloc[-1]] if len(floors) else floors
    note = "No floor was measured, so no effect can be claimed."
    note = note if len(result.floors) else "No rows were captured, so that there is nothing to compare."
    no_floor = not len(result.floors) or not result.floors["floor"].notna().any()
    notes = [note] if no_floor else []
    if len(result.floors) and (result.floors["verdict"] == ALARM).any():
        notes.append(f"**{ALARM[0].upper()}{ALARM[1:]}**: {ALARMED}.")
    return Section(
        heading="Drift: the same token, computed under another policy",
        text="For positions that both runs computed: the distance of their captured rows, relative to the row's norm. "
        f"{FLOOR} The distance in the same order stands beside them: on an engine that is deterministic given its "
        f"batches it is what the policy alone does. The baseline is `{result.baseline}`. Intervals are 95 % over "
        "prefix families (Student's t on a cluster jackknife, corrected for skewness); with fewer than six families "
        "there are none. The test exchanges the labels of runs of one order.",
        figures=[*_effects(deepest), *_by_bin(result)],
        tables=[
            *([effects_table(result)] if len(result.floors) else []),
            *([flips_table(result)] if len(result.flips) else []),
            *every_effect(result),
            *([every_comparison(result)] if len(result.drift) else []),
        ],
        notes=notes,
    )


def _effects(floors: pd.DataFrame) -> list[Figure]:
    """Effect and floor of every arm at the deepest hook point, one figure a phase."""
    figures = []
    for phase, part in floors.groupby("phase", sort=False) if len(floors) else ():
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


def _by_bin(result: AbResult) -> list[Figure]:
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
            caption="Around zero where the policy does nothing beyond what another order does.",
        )
    ]


def _proved(result: AbResult) -> str:
    """How many rows were proved to belong to their tokens."""
    proved = [c for checks in result.checks.values() for c in checks if c.name == "content" and c.holds]
    if not proved:
        return ""
    rows = format_number(sum(c.covered for c in proved))
    return f"The embedding of {rows} captured rows equals `embed(token_id)` bit for bit."


def _arguments(result: AbResult) -> Section:
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
    volatile = {"port", "nccl_port", "_launch_command", "random_seed_offset"}
    names = sorted({k for args in resolved.values() for k in args} - volatile)
    differing = [k for k in names if len({str(args.get(k)) for args in resolved.values()}) > 1]
    rows = [{"run": n, **{k: str(args.get(k)) for k in differing}} for n, args in resolved.items()]
    return Section(
        heading="How the arms differ",
        text="Every resolved server argument that is not the same in all runs.",
        tables=[Table(pd.DataFrame(rows), "Server arguments")],
    )
