"""GraphTaps in real CUDA graphs, without SGLang: the mechanism of docs/explanation/gpu.md alone. Needs a GPU.

    python bench/gpu_taps.py taps.json

A small residual model with a tap after every layer is captured at several sizes in one pool, as SGLang does; replays
follow each other on one stream with fewer real rows than the graph has, while the rows of the one before still travel
on another. Every row is compared with the model run eagerly on the same padded batch. Then: a graph
without a tap must be noticed, and so must a stale buffer.
"""

import json
import random
import sys
import time

import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.errors import LedgerError

D, LAYERS, SIZES, STEPS = 2048, 8, [64, 48, 32, 16, 8, 4, 2, 1], 400
if not torch.cuda.is_available():
    raise SystemExit("gpu_taps needs a GPU that PyTorch can use, and this machine has none; nothing was run.")
torch.manual_seed(0)
device = torch.device("cuda")
weights = [torch.randn(D, D, device=device, dtype=torch.bfloat16) / D**0.5 for _ in range(LAYERS)]
names = {f"blocks.{i}.hook_resid_post": (D, torch.bfloat16) for i in range(LAYERS)}
taps = GraphTaps(names, capacity=64, device=device, recording=torch.cuda.is_current_stream_capturing)
static = torch.zeros(64, D, device=device, dtype=torch.bfloat16)


def model(x, write=True, skip=None):
    seen = {}
    for i, w in enumerate(weights):
        x = x + torch.nn.functional.silu(x @ w)
        name = f"blocks.{i}.hook_resid_post"
        if write and i != skip:
            taps.write(name, x)
        seen[name] = x
    return x, seen


def async_d2h(t):  # SGLang's `_async_d2h`
    host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
    host.copy_(t, non_blocking=True)
    t.record_stream(torch.cuda.current_stream(t.device))
    return host


forward, copies, capture = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream()
pool, graphs = torch.cuda.graph_pool_handle(), {}
for n in SIZES:
    for _ in range(2):
        model(static[:n])
    torch.cuda.synchronize()
    graphs[n] = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graphs[n], pool=pool, stream=capture):
        model(static[:n])
    taps.check_recorded(n)

rng, flight, wrong, unequal, compared = random.Random(0), [], 0, 0, 0
began = time.perf_counter()
with torch.inference_mode(), torch.cuda.stream(forward):
    for _ in range(STEPS):
        n = rng.randint(1, 64)
        size = min(s for s in SIZES if s >= n)
        x = torch.randn(size, D, device=device, dtype=torch.bfloat16)
        static[:size].copy_(x)
        taps.arm()
        graphs[size].replay()
        snapshot = taps.snapshot(n, replayed=True)
        copies.wait_stream(forward)
        with torch.cuda.stream(copies):
            snapshot.send(async_d2h)
            event = torch.cuda.Event()
            event.record()
        flight.append((snapshot, event, x, n))
        if len(flight) == 3:  # two more are in flight after it
            snapshot, event, x, n = flight.pop(0)
            event.synchronize()
            snapshot.arrive()
            rows = snapshot.finish()
            _, want = model(x, write=False)
            for name in names:
                compared += n
                a, b = rows[name], want[name][:n].cpu()
                unequal += int((a != b).any(1).sum())  # cuBLAS may choose another algorithm while it is captured
                wrong += int(((a.float() - b.float()).norm(dim=1) > 0.02 * b.float().norm(dim=1)).sum())
seconds = time.perf_counter() - began
torch.cuda.synchronize()

# a graph that lacks a tap
torch.cuda.synchronize()
broken = torch.cuda.CUDAGraph()
with torch.cuda.graph(broken, pool=pool, stream=capture):
    model(static[:8], skip=3)
try:
    taps.check_recorded(8)
    at_capture = "MISSED"
except LedgerError as e:
    at_capture = str(e)
taps.arm()
broken.replay()
snapshot = taps.snapshot(8, replayed=True)
snapshot.send(async_d2h)
torch.cuda.synchronize()
snapshot.arrive()
try:
    snapshot.finish()
    at_replay = "MISSED"
except LedgerError as e:
    at_replay = str(e)

result = {
    "device": torch.cuda.get_device_name(),
    "replays": STEPS,
    "rows compared": compared,
    "rows of another owner": wrong,
    "rows not equal to the bit": unequal,
    "seconds": seconds,
    "missing tap at capture": at_capture,
    "missing tap at replay": at_replay,
    "holds": wrong == 0 and compared > 0 and "MISSED" not in (at_capture, at_replay),
}
with open(sys.argv[1], "w") as f:
    json.dump(result, f, indent=2)
print(json.dumps(result))
