"""The report of an experiment with several arms."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sglang_probe.report.figures import Figure, dots, grouped_bars, lines, request_strips, token_strip
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
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
from sglang_probe.studies.pages import ALARMED, FLOOR, deepest, facts, footer, only, proof, row_of_largest, with_layer

_NO_ROWS = "no rows were captured, or no position was computed by both runs of a pair"


def ab_page(result: AbResult) -> Page:
    """The page of one experiment: what was computed, what was not, and how far the common rows differ."""
    m = _manifest(result)
    workload = f"{m['workload']['source']}, {m['requests_expected']} requests, digest {m['workload_digest'][:12]}"
    backend = str(m.get("server_resolved", {}).get("attention_backend") or "not known")
    strips = _strips(result)
    return Page(
        title=f"What the engine computed: {result.name}",
        answer=f"{_coverage_answer(result)}; {_drift_answer(result)}",
        picture=strips if strips.drawn else _effects(result),
        tiles=_tiles(result),
        lead=f"The same {format_number(m['requests_expected'])} requests under {len(arms_of(result))} policies; "
        f"the baseline is `{result.baseline}`.",
        facts=facts(
            m, ("attention backend", backend), ("workload", workload), ("requests in flight", str(m["concurrency"]))
        ),
        sections=[
            _coverage(result),
            _drift(result, strips.drawn),
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


def _least_covered(result: AbResult) -> tuple[pd.Series | None, pd.Series | None]:
    """The arm that computed the smallest share of the prompts, as its row of all segments, and its worst segment."""
    whole = row_of_largest(only(result.by_segment, segment="all"), "coverage", least=True)
    if whole is None:
        return None, None
    mine = result.by_segment[(result.by_segment["arm"] == whole["arm"]) & (result.by_segment["segment"] != "all")]
    return whole, row_of_largest(mine, "coverage", least=True)


def _coverage_answer(result: AbResult) -> str:
    whole, worst = _least_covered(result)
    if whole is None:
        return "No prompt position was recorded"
    if not whole["reused"]:
        return f"Coverage of the prompts is {format_number(whole['coverage'], 'percent')} or more in every arm"
    of = f" (worst: `{worst['segment']}`, {_missed(worst)})" if worst is not None else ""
    return (
        f"Under `{whole['arm']}` the engine never computed {_missed(whole)} of the prompt positions{of}, because they "
        "came from the prefix cache"
    )


def _missed(row: pd.Series) -> str:
    return format_number(1 - row["coverage"], "percent")


def _drift_answer(result: AbResult) -> str:
    largest = row_of_largest(_deep(result), "effect")
    if largest is None:
        return f"how far rows differ between arms is not known: {_NO_ROWS}."
    return (
        f"rows of `{largest['hook_point']}` that both computed differ most under `{largest['arm']}` in "
        f"{largest['phase']}, by {format_number(largest['effect'], 'scientific')} in relative L2 (floor "
        f"{format_number(largest['floor'], 'scientific')}): {largest['verdict']}."
    )


def _tiles(result: AbResult) -> list[Tile]:
    whole, worst = _least_covered(result)
    tiles = []
    if whole is not None:
        prompt = format_number(int(whole["positions"]))
        tiles.append(
            Tile(
                "positions not computed",
                format_number(int(whole["reused"])),
                f"of {prompt} prompt positions in `{whole['arm']}`: they came from the prefix cache and have no row",
            )
        )
    if whole is not None and worst is not None:
        tiles.append(
            Tile(
                "least covered",
                format_number(worst["coverage"], "percent"),
                f"of the `{worst['segment']}` positions were computed in `{whole['arm']}`",
            )
        )
    if (r := row_of_largest(_deep(result), "effect")) is not None:
        tiles.append(
            Tile(
                "largest effect",
                format_number(r["effect"], "scientific"),
                f"relative L2 of `{r['arm']}` against `{result.baseline}` in {r['phase']}, floor "
                f"{format_number(r['floor'], 'scientific')}: {r['verdict']}",
            )
        )
    return tiles


def _strips(result: AbResult) -> Figure:
    """Requests of one prefix family, position by position, in the arm that reuses most."""
    example = result.example
    return request_strips(
        example["requests"] if example["reuses"] else {},
        title=f"What `{example['arm']}` computed of {len(example['requests'])} requests, and what it reused",
        caption=f"Requests{' of one prefix family' if example['related'] else ''} in the order of the workload; the "
        "first run of the arm.",
        position_label="token position",
    )


def _coverage(result: AbResult) -> Section:
    by_position = result.by_position
    if len(by_position):
        by_position = by_position.assign(position=by_position["start"])
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
                caption="Share of prompt positions in traffic that the engine computed.",
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
            ),
            token_strip(
                result.example["strips"],
                result.example["segments"],
                title=f"One request ({result.example['rid']}), position by position",
                caption=f"The request of which `{result.example['arm']}` reused most.",
            ),
        ],
        tables=[coverage_table(result)],
        nothing="the runs have no prompt position",
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


def _drift(result: AbResult, effects: bool) -> Section:
    """Args: effects: whether the section has the picture of effects, which else is at the head of the page."""
    no_floor = not len(result.floors) or not result.floors["floor"].notna().any()
    notes = ["No floor was measured, so no effect can be claimed."] if no_floor and len(result.floors) else []
    if len(result.floors) and (result.floors["verdict"] == ALARM).any():
        notes.append(f"**{ALARM[0].upper()}{ALARM[1:]}**: {ALARMED}.")
    return Section(
        heading="Drift: the same token, computed under another policy",
        text="For positions that both runs computed: the distance of their captured rows, relative to the row's norm. "
        f"{FLOOR} The distance in the same order stands beside them: on an engine that is deterministic given its "
        f"batches it is what the policy alone does. The baseline is `{result.baseline}`. Intervals are 95 % over "
        "prefix families (Student's t on a cluster jackknife, corrected for skewness); there is none where the "
        "families are too few. The test exchanges the labels of runs of one order.",
        figures=[*([_effects(result)] if effects else []), *_by_layer(result), *_by_bin(result)],
        tables=[
            effects_table(result),
            *([flips_table(result)] if len(result.flips) else []),
            *every_effect(result),
            every_comparison(result),
        ],
        notes=notes,
        nothing=_NO_ROWS,
    )


def _deep(result: AbResult) -> pd.DataFrame:
    """Floors at the deepest hook point, which the embedding is not."""
    return deepest(result.floors[result.floors["hook_point"] != EMBED]) if len(result.floors) else result.floors


def _effects(result: AbResult) -> Figure:
    """Effect and floor of every arm at the deepest hook point, a panel a phase."""
    floors = _deep(result)
    parts = []
    for what in ("effect", "floor") if len(floors) else ():
        ends = {side: floors.get(f"{what}_{side}") for side in ("low", "high")}
        parts.append(
            pd.DataFrame({"arm": floors["arm"], "phase": floors["phase"], "what": what, "l2": floors[what], **ends})
        )
    where = floors["hook_point"].iloc[0] if len(floors) else "rows"
    return dots(
        pd.concat(parts) if parts else pd.DataFrame(),
        "arm",
        "what",
        "l2",
        panel="phase",
        low="low",
        high="high",
        kind="scientific",
        title=f"`{where}`: effect of each arm beside its floor",
        x_label=f"mean relative L2 against `{result.baseline}`; floor: of runs of the same arm".replace("`", ""),
        caption="Lines are 95 % intervals, where there are enough prefix families for one.",
    )


def _by_layer(result: AbResult) -> list[Figure]:
    """Effect and floor of every arm on an axis of layers, where there are many; a figure a phase."""
    frame = with_layer(result.floors)
    figures = []
    for phase, mine in frame.groupby("phase", sort=False) if len(frame) else ():
        parts = [mine[["layer"]].assign(arm=mine["arm"], l2=mine["effect"])]
        parts.append(mine[["layer"]].assign(arm="floor of " + mine["arm"], l2=mine["floor"]))
        figures.append(
            lines(
                pd.concat(parts, ignore_index=True),
                "layer",
                "l2",
                "arm",
                kind="scientific",
                title=f"{phase}: effect of each arm and its floor, by layer of `{mine['site'].iloc[0]}`",
                x_label="layer",
                y_label=f"mean relative L2 against {result.baseline}",
            )
        )
    return figures


def _by_bin(result: AbResult) -> list[Figure]:
    """How much effect exceeds floor along the sequence, per arm, at the deepest hook point."""
    frame = deepest(result.by_bin)
    frame = frame[frame["excess"].notna()] if len(frame) else frame
    if frame.empty:
        return []
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
    rows = [{"run": n, "how": ", ".join(f"{k}: {args.get(k)}" for k in differing)} for n, args in resolved.items()]
    return Section(
        heading="How the arms differ",
        text="Every resolved server argument and switch that is not the same in all runs.",
        tables=[Table(pd.DataFrame(rows), "Server arguments", columns=[Column("run"), Column("how", "arguments")])],
        nothing="the manifests name no argument",
    )
