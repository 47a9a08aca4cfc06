"""Captured rows against `transformers`, un-rotated queries against captured ones, and telemetry in the step against
telemetry afterwards, for every reviewed architecture in two dtypes; tables in docs/reference/queries.md.

    python -m tests.end_to_end.parity [--out docs/reference/queries.md]

One engine per architecture and dtype, on the tiny models of test_models.py: about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from sglang_probe.eviction.from_run import layer_from_run
from sglang_probe.run.hook_points import ATTENTION, EMBED, QUERY, RESID_POST, parse_hook_point
from sglang_probe.run.run import Run, load_run
from sglang_probe.stats.distance import row_distance
from sglang_probe.verify.reference import reference_errors
from sglang_probe.verify.verify import verify
from tests.end_to_end.telemetry_parity import telemetry_differences
from tests.end_to_end.test_models import CASES, make_model

KINDS = {"LlamaForCausalLM": "llama", **CASES}
DTYPES = ("float32", "bfloat16")
LAYERS = 3


def record(folder: Path, kind: str, dtype: str) -> tuple[Run, Path]:
    """Harvest a few requests of the tiny model, with every hook point and telemetry of every step."""
    model = folder / "model"
    if not model.exists():
        make_model(model, kind)
    sites = [RESID_POST, *ATTENTION]
    config = {
        "model": str(model),
        "dtype": dtype,
        "workload": {"source": "shared_prefix", "families": 1, "requests_per_family": 4, "exemplars": 1},
        "sampling": {"max_new_tokens": 32, "temperature": 1.0},
        "hook_points": [EMBED, *(f"blocks.{i}.{site}" for i in range(LAYERS) for site in sites)],
        "telemetry": {"every": 1},
        "server": {"chunked_prefill_size": 128},
        "arm": {"cache": "off"},
    }
    path = folder / f"{dtype}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "sglang_probe", "harvest", str(path), "--output", str(folder / dtype)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{kind} {dtype}: {done.stdout}{done.stderr}")
    run = load_run(folder / dtype)
    if wrong := [str(c) for c in verify(run) if not c.holds]:
        raise SystemExit(f"{kind} {dtype}: {wrong}")
    return run, model


def unrotation_error(run: Run) -> float:
    """Largest relative L2 error of queries un-rotated from `hook_rot_q` against the captured `hook_q`."""
    worst = 0.0
    for rid in run.requests()["rid"]:
        for i in range(LAYERS):
            layer = layer_from_run(run, rid, i)
            assert layer.rotary is not None
            back = layer.rotary.unrotate(layer.q_NHD, torch.arange(layer.length)).flatten(1)
            truth = run.activations(rid, f"blocks.{i}.{QUERY}")[: layer.length]
            worst = max(worst, float(row_distance(back, truth)[0].max()))
    return worst


def table(cells: pd.DataFrame, head: str) -> str:
    """Markdown with one row per index entry."""
    lines = [f"| {head} | " + " | ".join(map(str, cells.columns)) + " |", "|---|" + "---|" * len(cells.columns)]
    return "\n".join(
        [
            *lines,
            *(f"| {name} | " + " | ".join(row) + " |" for name, row in zip(cells.index, cells.to_numpy(), strict=True)),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/reference/queries.md"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    args = parser.parse_args()
    rows, telemetry, values = {}, {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for architecture in args.kinds:
            for dtype in DTYPES:
                run, model = record(Path(folder) / architecture, KINDS[architecture], dtype)
                errors = reference_errors(run, str(model), requests=4)
                by_site: dict[str, float] = {}
                for name, e in errors.items():
                    site = parse_hook_point(name).site
                    by_site[site] = max(by_site.get(site, 0.0), float(e.max()))
                    values += len(e)
                by_site["un-rotated hook_rot_q against hook_q"] = unrotation_error(run)
                label = f"{architecture}, {dtype}"
                rows[label] = {k: f"{v:.1e}" if v else "0" for k, v in by_site.items()}
                found = telemetry_differences(run, Path(folder) / "telemetry.parquet")
                telemetry[label] = {k: f"{v:.1e}" if v else "0" for k, v in found["max"].items()}
                print(label, rows[label], telemetry[label], flush=True)
                deep = np.concatenate([e for name, e in errors.items() if name != EMBED])
                print(f"  median row {np.median(deep):.1e}, rows above 0.1: {(deep > 0.1).mean():.2%}", flush=True)
    parity, online = (table(pd.DataFrame(t).T.fillna(""), "architecture, dtype") for t in (rows, telemetry))
    text = args.out.read_text(encoding="utf-8")
    for name, found_table in (("rows", parity), ("telemetry", online)):
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(begin)
        text = before + begin + f"\n{found_table}\n\n" + end + rest.split(end)[1]
    args.out.write_text(text, encoding="utf-8")
    print(f"{values:,} rows; written to {args.out}")


if __name__ == "__main__":
    main()
