"""What every peer's script does: load a model once, then harvest prompts to disk as often as it is asked on stdin.

Runs in the peer's own environment, which has neither SGLang nor sglang-probe: PyTorch, safetensors and the peer.
One JSON object a line comes in, and one line that begins with `RESULT ` goes out for each, the first after loading.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

MARK = "RESULT "
SHARD_BYTES = 64 << 20
"""Rows of one layer that a file holds."""


def answer(found: dict[str, Any]) -> None:
    """Tell the driver; what libraries print lies between."""
    print(MARK + json.dumps(found), flush=True)


def peak_rss_mib() -> float:
    """Most memory that this process has had. `getrusage` would begin at what its parent held."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def versions(*packages: str) -> dict[str, str]:
    """What is installed here, beside Python itself."""
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


class RowWriter:
    """Rows of some layers, in the order in which they come, as `layer-<n>/shard-<k>.safetensors`."""

    def __init__(self, folder: Path, layers: Sequence[int]) -> None:
        self.folder, self.layers = folder, layers
        self.rows = 0
        self._held: list[list[Any]] = [[] for _ in layers]
        self._bytes = self._shards = 0
        for layer in layers:
            (folder / f"layer-{layer}").mkdir(parents=True)

    def add(self, of_layers: Sequence[Any]) -> None:
        """One tensor `[rows, width]`, float32, for each layer; they are kept until a file is full."""
        for held, rows in zip(self._held, of_layers, strict=True):
            held.append(rows)
        self.rows += len(of_layers[0])
        self._bytes += of_layers[0].nbytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        import torch
        from safetensors.torch import save_file

        if not self._bytes:
            return
        for layer, held in zip(self.layers, self._held, strict=True):
            save_file(
                {"rows": torch.cat(held)}, self.folder / f"layer-{layer}" / f"shard-{self._shards:05d}.safetensors"
            )
            held.clear()
        self._bytes, self._shards = 0, self._shards + 1


Batches = Callable[[list[list[int]], int], Iterator[Sequence[Any]]]
"""Of prompts of one length and a batch size: for each batch a tensor `[batch * length, width]` for each layer."""


def serve(load: Callable[[Path, Sequence[int]], Batches], packages: Sequence[str]) -> None:
    """Load, and answer until stdin ends.

    Args:
        load: of a checkpoint and layers, what makes rows of prompts.
    """
    given = json.loads(sys.argv[1])
    began = time.perf_counter()
    import torch

    batches = load(Path(given["model"]), given["layers"])
    loaded = time.perf_counter() - began
    answer({"load_seconds": loaded, "versions": versions("torch", "transformers", *packages)})
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        prompts = json.loads(Path(asked["prompts"]).read_text())
        began, cpu = time.perf_counter(), time.process_time()
        writer = RowWriter(Path(asked["out"]), given["layers"])
        for rows in batches(prompts, asked["batch"]):
            writer.add(rows)
        writer.flush()
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        answer({**spent, "rows": writer.rows, "peak_rss_mib": peak_rss_mib()})
