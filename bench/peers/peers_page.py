"""docs/evidence/peers.md and its figure, of the numbers in the JSON beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from environments import OURS, PEERS

from sglang_probe.report import grouped_bars

GOALS = {"unshared": 1.0, "shared": 3.0}
MINE = next(iter(OURS))
"""As it is installed."""

HEAD = """# Beside what people would pick

Written by `bench/peers/run.py` (`make bench-peers`); do not edit. The numbers are those of `peers.json` beside this
page, and each section says with which prompts, batch sizes and rounds they were measured.

How fast do rows of the residual stream get to disk? [In short](#in-short) has the outcome; first, how it was measured.
Every tool gets the same token ids and layers, in float32, on the CPU. Every other tool (a *peer*) has an environment of
its own, installed from `constraints/peers.txt`, and a process that loads the model once. All environments have one
release of PyTorch; the tables name the other versions. One process runs at a time; the others are stopped. In a warm-up
round with nothing shared, each peer tries 1 and 2 threads and the batch sizes that its section names, and keeps the
fastest. sglang-probe runs as it is installed, with one thread, and in rows named *2 threads* with `OMP_NUM_THREADS=2`.
A round then runs every tool on every set of prompts once, in a shuffled order, so that other work on the machine slows
all alike: **a ratio is taken within a round, and only ratios are claimed**. Before each harvest, what the one before it
left in the page cache is written to disk.

*Positions covered per second* is what a user waits for: prompt positions whose rows can be read afterwards. *Rows on
disk per second* counts positions that were computed and written; the rows of all layers at a position count as one. The
two differ for sglang-probe alone, which computes a shared prefix once and, when rows are read, gives the other prompts
the rows of the one that computed it. *Per CPU second* is the number of positions covered over the CPU time of all
processes of a tool, again as a ratio. Other work on the machine changes this ratio less, and idle cores do not count in
it. *The best other* is the peer with the highest median of positions covered per second; both columns of ratios are to
it. Where another peer covers more per CPU second, the goals below name that one too.

Every number with a range is the median of the rounds. A ratio is the median of the ratios of single rounds, and **not**
the quotient of the rates in its table, which are medians of their own: where rounds differ much the two are far apart,
and may even put tools in another order.

After every harvest the row count is checked (rows and reused positions together are all positions). Of up to 24
prompts, 12 positions each, the rows are compared with those of sglang-probe: a peer with a row that is further from
ours than 0.001 of the row's length ends the benchmark.

## In short

The goals are ratios of positions covered per second to the best other: 1.0 with nothing shared, 3.0 with 80 % shared.
"""

MEANING = (
    "**What it means for you**: where prompts share much, sglang-probe was ahead of every peer that was measured. "
    "Where they share nothing it was not faster, and with one thread about half as fast; what it adds there is the "
    "ledger. With a free core, set `OMP_NUM_THREADS=2` for a harvest that is mostly prefill."
)
"""Of the numbers that are in the JSON now: to be read again after a measurement."""

SETUP = """## Where the time goes

Of the time of a harvest with nothing shared, of probe-text and on one thread, the engine's scheduler process takes 97 %
of all CPU time. A sampling profile of it (py-spy, once, on a busy machine, before the changes below) found, of the
samples of its main thread: 89 % in the model's forward pass (57 % in products of float32 matrices, 21 % in attention,
12 % in operators that PyTorch does not fuse, half of that the rotary embedding), and at most 3 % in the probe's own
hooks, including what SGLang does inside them. The peers compute the same products and the same attention with the same
kernels: timed alone, attention request by request costs what it costs as one batch. The writer's thread waits nearly
all of its time. So where nothing is shared, neither the disk nor the ledger is what bounds sglang-probe.

What was made faster since the first measurement of this page, without changing a bit of any row:

* `order: families`, the default of `sglang-probe harvest`: a request that begins like an earlier one waits until that
  one's prompt is computed. Requests that were in flight together computed their common beginning each for itself.
* The rotary embedding and the activation make fewer passes over memory (`engine/platform/operators.py`).
* The scheduler sleeps when it has no requests (SGLang's `sleep_on_idle`). It spun on a core while a run was opened,
  closed and read.
* Whether SGLang's source is as it was reviewed is checked once in each process, not at each recording.

Against the engine before these changes, in four interleaved rounds of 128 prompts of 256 tokens on a busy machine, they
gave **1.13** (1.11 to 1.15) times as many positions for a CPU second with nothing shared, and **1.80** (1.43 to 3.25)
times as many with 80 % shared.

Rows, outputs and spans of the engine before and after are equal to the bit: of both models in float32, of probe-text in
bfloat16 too, with prompts in one piece, in chunks of 64 and after a cached prefix, and 12 decode steps, at three
layers.

**One thread or two.** On a machine with a free core, set `OMP_NUM_THREADS=2` for a harvest that is mostly prefill: see
the rows *2 threads* above. One thread stays the default, because on a busy machine a parallel product waits for
whichever thread has no core. There, two threads for prefills reached **0.27** (0.14 to 0.46) of the
speed of one where nothing was shared, and **0.13** (0.12 to 0.27) with 80 % shared, in three rounds of an earlier
measurement. PyTorch may also sum in another order with another number of threads, although no bit differed at the
shapes of both models.

## How each is used

* **transformers, hooks**: the model without its head, cut after the last layer that is captured; forward hooks;
  `inference_mode`; batches of prompts of one length, so that nothing is padding.
* **SAELens `ActivationsStore`**: `from_config_multi_hook` over `AutoModelForCausalLM`, `get_batch_tokens` and
  `get_multi_hook_activations`, without its mixing buffer. It computes logits. Its own `CacheActivationsRunner` writes
  one hook point only, so its rows are written as those of the others are.
* **nnsight**: one `trace` per batch over the model without its head, ended at the last layer that is captured.
* **interp-engine**: the eager backend, the one that runs without CUDA; `capture` of a batch, with attention `sdpa` in
  place of its default. Its vLLM backends, which are its fast ones, were not run.
* **sglang-probe**: `Experiment.record`, which is what `sglang-probe harvest` runs, with the defaults of that command
  (16 requests in flight, `order: families`) and one output token. Its time includes checking the requests, ledger,
  journal, hashes, `fsync` and closing the run directory; the others write safetensors files and no more.

The peers could reuse a shared prefix too, with `past_key_values` and code by the user that knows which prompts share
what. None of them does it by itself, and no such code was written for them.

In the measurement of probe-text three environments had transformers 5.24.0, although `constraints/peers.txt` says
5.19.0. Their rows are equal to ours all the same.

The layers that are captured here include the last one. If you capture early layers only, hooks, nnsight and SAELens'
TransformerLens models can stop after them, and an engine cannot: then they do better than in these tables.
"""


def write(every: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """The page, and `<its name>.svg`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".svg").write_text(figure(every))
    out.write_text(page(every, out.with_suffix(".svg").name))


def page(every: Mapping[str, Mapping[str, Any]], figure_name: str) -> str:
    """All of it."""
    image = f"![Positions covered per second by model, prompts and tool]({figure_name})"
    sections = [line for found in every.values() for line in _section(found)]
    return "\n".join([HEAD, *verdict(every), "", image, "", *sections, SETUP])


def covered_per_second(found: Mapping[str, Any], workload: str, name: str) -> list[float]:
    """Prompt positions, by round."""
    positions = found["prompts"] * found["length"]
    visits = (r[workload][name] for r in found["rounds"])
    return [positions / v["seconds"] for v in visits]


def per_cpu_second(found: Mapping[str, Any], workload: str, name: str) -> list[float]:
    """Prompt positions, by round, over the CPU time of all its processes."""
    return [found["prompts"] * found["length"] / r[workload][name]["cpu_seconds"] for r in found["rounds"]]


def rows_per_second(found: Mapping[str, Any], workload: str, name: str) -> list[float]:
    """Positions written, by round."""
    visits = (r[workload][name] for r in found["rounds"])
    return [v["rows"] / v["seconds"] for v in visits]


def others(found: Mapping[str, Any]) -> list[str]:
    """Names of the peers that ran."""
    return [name for name in found["chosen"] if name not in OURS]


def best_other(found: Mapping[str, Any], workload: str) -> str:
    """That with the highest median."""
    return max(others(found), key=lambda n: statistics.median(covered_per_second(found, workload, n)))


def ratios(found: Mapping[str, Any], workload: str, name: str, base: str) -> list[float]:
    """Of positions covered per second, by round."""
    pairs = zip(covered_per_second(found, workload, name), covered_per_second(found, workload, base), strict=True)
    return [a / b for a, b in pairs]


def verdict(every: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What came of the goals, in words."""
    for found in every.values():
        for workload, goal in GOALS.items():
            base = best_other(found, workload)
            got = ratios(found, workload, MINE, base)
            which = "best other" if len(others(found)) > 1 else "only other that was measured"
            yield (
                f"* {found['model']}, {_prompts(found, workload)}: {_told(got)} of the {which}, {base}, and "
                f"{_per_cpu(found, workload, base)}. The goal, {goal:.1f}, is **{_outcome(got, goal)}**."
            )
            for name in (n for n in OURS if n != MINE and n in found["chosen"]):
                other = ratios(found, workload, name, base)
                yield f"  With {name.partition(', ')[2]}: {_told(other)} of {base}: **{_outcome(other, goal)}**."
    yield (
        f"\n{MEANING} Where other work ran on the machine (each section says so), trust the ratio per CPU second: the "
        "other depends on which of a tool's processes got a core."
    )


def _outcome(got: Sequence[float], goal: float) -> str:
    if min(got) >= goal:
        return "reached"
    return "missed" if max(got) < goal else "not settled: its rounds lie on both sides"


def _per_cpu(found: Mapping[str, Any], workload: str, base: str) -> str:
    """Ratios per CPU second: to the best other, and to the one that covers most for a CPU second."""
    thrifty = max(others(found), key=lambda n: statistics.median(per_cpu_second(found, workload, n)))
    told = f"{_told(_cpu_ratios(found, workload, MINE, base))} per CPU second"
    if thrifty == base:
        return told
    return f"{told} (of {thrifty}, which needs least CPU time: {_told(_cpu_ratios(found, workload, MINE, thrifty))})"


def _cpu_ratios(found: Mapping[str, Any], workload: str, name: str, base: str) -> list[float]:
    spent = zip(*(per_cpu_second(found, workload, n) for n in (name, base)), strict=True)
    return [a / b for a, b in spent]


def figure(every: Mapping[str, Mapping[str, Any]]) -> str:
    """Positions covered per second, as an SVG file of its own."""
    rows = []
    for found in every.values():
        for name in found["chosen"]:
            for workload in GOALS:
                rates = covered_per_second(found, workload, name)
                rows.append((f"{found['model']}: {name}", _SERIES[workload], statistics.median(rates)))
    frame = pd.DataFrame(rows, columns=["tool", "prompts", "rate"])
    return grouped_bars(
        frame.assign(rate=frame["rate"].round()),
        "tool",
        "prompts",
        "rate",
        title="Prompt positions covered per second, disk included",
        kind="integer",
        unit="/s",
    ).standalone()


_SERIES = {"unshared": "nothing shared", "shared": "80 % shared"}


def _prompts(found: Mapping[str, Any], workload: str) -> str:
    share = found["shares"][workload]
    return "nothing shared" if share < 0.02 else f"{100 * share:.0f} % shared"


def _told(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"**{values[0]:.2f}** (one round)"
    return f"**{statistics.median(values):.2f}** ({min(values):.2f} to {max(values):.2f})"


def _section(found: Mapping[str, Any]) -> Iterator[str]:
    positions = found["prompts"] * found["length"]
    layers = " and ".join(map(str, found["layers"]))
    yield f"## {found['model']}\n"
    yield (
        f"{found['machine']}; {_beside(found)}. "
        f"{found['prompts']} prompts of {found['length']} tokens, {positions:,} positions, residual stream after "
        f"layers {layers} (counted from 0). Of the shared prompts, families that share a prefix: {found['families']}. "
        f"Batch sizes tried: {' and '.join(map(str, found['batches']))}. "
        + ("One round.\n" if len(found["rounds"]) == 1 else f"{len(found['rounds'])} rounds; median (range).\n")
    )
    for workload in GOALS:
        yield f"### {found['model']}: {_prompts(found, workload)}\n"
        yield from _table(found, workload)
        yield ""
        yield from _ours(found, workload)
    yield from _processes(found)
    for name, why in found["missing"].items():
        yield f"\n{name} could not be run here: `{why}`"
    if left := [p.name for p in PEERS if p.name not in {*found["chosen"], *found["missing"]}]:
        yield f"\nNot measured here, to save time: {'; '.join(left)}."
    yield ""


def _beside(found: Mapping[str, Any]) -> str:
    """What else the machine did."""
    if "beside" in found:  # by hand, where it was seen
        return f"{found['beside']}; load average {found['load'][0]} in the last minute"
    if found.get("quiet"):
        return f"no other engine or training ran beside it, load average {found['load'][0]} in the last minute"
    return f"other work ran beside it, load average {found['load'][0]} in the last minute"


def _table(found: Mapping[str, Any], workload: str) -> Iterator[str]:
    best = best_other(found, workload)
    base = f"over the {'best' if len(others(found)) > 1 else 'only'} other ({best})"
    yield f"| tool | positions covered/s | {base} | per CPU second | rows on disk/s | on disk, MB |"
    yield "|---|---|---|---|---|---|"
    order = sorted(found["chosen"], key=lambda n: -statistics.median(covered_per_second(found, workload, n)))
    for name in order:
        covered = statistics.median(covered_per_second(found, workload, name))
        rows = statistics.median(rows_per_second(found, workload, name))
        size = found["rounds"][-1][workload][name]["bytes"] / 1e6
        ratio = "1" if name == best else _told(ratios(found, workload, name, best))
        cpu = "1" if name == best else _told(_cpu_ratios(found, workload, name, best))
        yield f"| {name} | {covered:,.0f} | {ratio} | {cpu} | {rows:,.0f} | {size:.1f} |"


def _ours(found: Mapping[str, Any], workload: str) -> Iterator[str]:
    visits = [r[workload][MINE] for r in found["rounds"]]
    reused = statistics.median(v["reused"] for v in visits) / (found["prompts"] * found["length"])
    outside = statistics.median(1 - v["serving_seconds"] / v["seconds"] for v in visits)
    share = found["shares"][workload]
    why = "" if reused > share - 0.02 else " (prompts in flight together each compute what none of them has finished)"
    yield (
        f"sglang-probe reused {reused:.0%} of the positions; {share:.0%} are shared{why}. It spent {outside:.0%} of "
        "its time before the first request and after the last answer.\n"
    )


def _processes(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {found['model']}: processes\n"
    yield "| tool | setting | start, s | peak memory, MiB | furthest row from ours | versions |"
    yield "|---|---|---|---|---|---|"
    for name, loaded in found["loaded"].items():
        setting = ", ".join(f"{k} {v}" for k, v in found["chosen"][name].items()) or "defaults"
        peak = max(r[w][name]["peak_rss_mib"] for r in found["rounds"] for w in GOALS)
        said = ", ".join(f"{k} {v}" for k, v in loaded["versions"].items() if k != "python")
        far = found["distance"][name]
        yield f"| {name} | {setting} | {loaded['load_seconds']:.0f} | {peak:,.0f} | {far:.1g} | {said} |"
    yield ""
    yield (
        "Start: imports, loading the model and, for sglang-probe, the start of SGLang's processes and a first request; "
        "no rate includes it. Memory: the most that the process ever had; for sglang-probe the sum over its processes, "
        "KV pool and prefix cache included, in which pages that they share count several times. Furthest row from "
        "ours: the largest distance of a row, over the length of the row; 0: all numbers that were compared are equal."
    )
    if found["length"] % 16 == 0:
        yield (
            f"\nPrompts have {found['length']} tokens. On another run on such a machine, [only rows past the last "
            "multiple of 16 had other bits](../../experiments/row-counts/RESULT.md) when a text was computed in pieces."
        )
    if floor := found.get("peak_floor_mib"):  # of measurements that asked `getrusage`; by hand
        yield (
            f"\nMemory of the others was counted from what the benchmark held when it started them, about {floor} MiB, "
            "and cannot be shown as less: a peer whose peak is near that may have needed less."
        )
