"""Time and memory of training on the same rows: `sglang-probe sae train` and SAELens' own `ActivationsStore`.

    python bench/sae_training.py RUN --hook-point blocks.2.hook_resid_post        # needs SAELens

Each way is a process of its own, in turns, three times; all train one BatchTopK dictionary with SAELens' trainer, the
same recipe and as many rows. Ours reads the run directory: once into a buffer that holds all of it, once with a buffer
of as many rows as that of SAELens. SAELens reads the same rows from a dataset that its `CacheActivationsRunner` would
write. Memory is the most that the process had beyond imports and training: a process that trains on one batch, again
and again, is measured too and taken off. Only the ratio means something, and only of this session; of the seconds until
the first batch there is none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT, BATCH, LATENTS, K = 128, 1024, 1024, 16
PROMPTS, BUFFERED = 32, 20
"""Contexts that SAELens reads at a time, and such reads in its buffer."""
SHUFFLED = PROMPTS * BUFFERED * CONTEXT
WAYS = ("ours, all in memory", "ours, as many rows", "ActivationsStore", "one batch")


def main() -> None:
    """Print the table, or, as a child, one way's numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--hook-point", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--dataset", type=Path)
    given = parser.parse_args()
    if given.way is not None:
        print(json.dumps(_theirs(given) if given.way == WAYS[2] else _ours(given)))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        rows = _write_dataset(given.run, given.hook_point, folder / "rows")
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(given.repeats):
            for way in found:
                found[way].append(_child(given, way, folder / "rows"))
                print(way, found[way][-1], file=sys.stderr, flush=True)
        _table(found, rows, given.steps)
    finally:
        shutil.rmtree(folder)


def _child(given: argparse.Namespace, way: str, dataset: Path) -> dict[str, float]:
    asked = [str(given.run), "--hook-point", given.hook_point, "--steps", str(given.steps), "--way", way]
    done = subprocess.run(
        [sys.executable, __file__, *asked, "--dataset", str(dataset)], capture_output=True, text=True, check=True
    )
    numbers: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers


def _write_dataset(run: Path, hook_point: str, folder: Path) -> int:
    """The run's rows as SAELens caches them: `[context, width]` an entry. Returns how many rows."""
    import datasets

    from sglang_probe.run.run import load_run
    from sglang_probe.sae.harvested import harvested

    x = harvested([load_run(run)], hook_point).x_ND.float().numpy()
    n, width = len(x) // CONTEXT, x.shape[1]
    features = datasets.Features({hook_point: datasets.Array2D(shape=(CONTEXT, width), dtype="float32")})
    parts = x[: n * CONTEXT].reshape(n, CONTEXT, width)
    datasets.Dataset.from_dict({hook_point: parts}, features=features).save_to_disk(str(folder))
    return n * CONTEXT


def _ours(given: argparse.Namespace) -> dict[str, float]:
    import importlib

    import torch

    from sglang_probe.run.run import load_run
    from sglang_probe.sae.harvested import listed
    from sglang_probe.sae.recipe import Recipe
    from sglang_probe.sae.schedule import schedule
    from sglang_probe.sae.shelf import Shelf
    from sglang_probe.sae.train import Task, norm_scale, train

    importlib.import_module("sae_lens")  # not counted
    _touch_libraries()
    before, start = _memory(begin=True), time.perf_counter()
    if given.way == WAYS[3]:
        rows, x = None, load_run(given.run).rows(given.hook_point, np.arange(BATCH)).float()
        scale, held_out = norm_scale([x]), x[:256]
    else:
        rows = listed([load_run(given.run)], given.hook_point)
        order = schedule(rows, None, 0, SHUFFLED if given.way == WAYS[1] else None)
        shelf = Shelf(rows, order)
        scale = norm_scale(rows.batches(order.batch(0, 20 * BATCH)))
        held_out = shelf.batch(0, BATCH)[:256]
    loaded = time.perf_counter()
    recipe = Recipe(k=K, samples=given.steps * BATCH, batch_size=BATCH)

    def batch(step: int) -> torch.Tensor:
        return x if rows is None else shelf.batch(step, BATCH)

    with tempfile.TemporaryDirectory() as folder:
        train(Task(recipe, LATENTS, 0, batch, scale, held_out, Path(folder) / "x", curve_points=1))
    return _numbers(before, start, loaded, given.steps)


def _touch_libraries() -> None:
    """Have the pages of libraries in memory that reading a table needs: as little a part of the rows as an import."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        frame = pd.DataFrame({"a": ["x", "y"], "b": [[1], [2]]})
        frame.to_parquet(Path(folder) / "x.parquet")
        pd.read_parquet(Path(folder) / "x.parquet").merge(frame[["a"]], on="a").groupby("a").size()


def _theirs(given: argparse.Namespace) -> dict[str, float]:
    import torch
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.activations_store import ActivationsStore

    width = int(np.asarray(_width(given.dataset, given.hook_point)))
    _touch_libraries()
    before, start = _memory(begin=True), time.perf_counter()
    nothing: Any = torch.nn.Identity()  # the model of a store of cached rows is never asked
    store = ActivationsStore(
        model=nothing,
        dataset=None,
        streaming=False,
        hook_name=given.hook_point,
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=width,
        n_batches_in_buffer=BUFFERED,
        total_training_tokens=given.steps * BATCH,
        store_batch_size_prompts=PROMPTS,
        train_batch_size_tokens=BATCH,
        prepend_bos=False,
        normalize_activations="expected_average_only_in",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(given.dataset),
    )
    next(iter(store))
    loaded = time.perf_counter()
    torch.manual_seed(0)
    config: dict[str, Any] = {"d_in": width, "d_sae": LATENTS, "k": K, "device": "cpu"}
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**config, normalize_activations="expected_average_only_in"))
    trainer: Any = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=given.steps * BATCH,
            train_batch_size_samples=BATCH,
            lr=1e-3,
            lr_end=1e-4,
            lr_warm_up_steps=20,
            lr_decay_steps=given.steps // 4,
            device="cpu",
            dead_feature_window=60,
            feature_sampling_window=10**9,
            n_batches_for_norm_estimate=20,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(store),
    )
    trainer.fit()
    return _numbers(before, start, loaded, given.steps)


def _width(dataset: Path, hook_point: str) -> int:
    import datasets

    return int(datasets.load_from_disk(str(dataset)).features[hook_point].shape[1])


def _memory(*, begin: bool = False) -> float:
    """Most memory that this process has had since `begin`, MiB. (`ru_maxrss` begins with that of the parent.)"""
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    told = Path("/proc/self/status").read_text()
    return float(told.split("VmHWM:")[1].split()[0]) / 1024


def _numbers(before: float, start: float, loaded: float, steps: int) -> dict[str, float]:
    end = time.perf_counter()
    million = steps * BATCH / 1e6
    return {"load": loaded - start, "train": (end - loaded) / million, "memory": _memory() - before}


def _table(found: dict[str, list[dict[str, float]]], rows: int, steps: int) -> None:
    print(f"{rows:,} rows, {steps * BATCH:,} of them trained on ({steps} steps of {BATCH}), {LATENTS} latents; the")
    print(f"buffers of the second and third way hold {SHUFFLED:,} rows.\n")
    shown = WAYS[:3]
    print("| | " + " | ".join(f"`{w}`" if w == WAYS[2] else w for w in shown) + " | first / third | second / third |")
    print("|---|" + "---|" * 5)
    bare = np.mean([r["memory"] for r in found[WAYS[3]]])
    for key, told in {
        "load": "seconds until the first batch",
        "train": "seconds a million rows",
        "memory": f"MiB beyond training on one batch ({bare:.0f})",
    }.items():
        of = {w: [r[key] - (bare if key == "memory" else 0) for r in found[w]] for w in shown}
        digits, ratios = 1, ["", ""]
        if key == "load":  # the third is next to nothing: a ratio to it means as little
            digits = 2
        else:
            ratios = [", ".join(f"{a / b:.2f}" for a, b in zip(of[w], of[WAYS[2]], strict=True)) for w in shown[:2]]
        told_of = (", ".join(f"{v:.{digits}f}" for v in of[w]) for w in shown)
        print(f"| {told} | " + " | ".join([*told_of, *ratios]) + " |")
    if len(found[WAYS[0]]) == 1:
        print("\nOne run of each: differences of this size may be chance.")


if __name__ == "__main__":
    main()
