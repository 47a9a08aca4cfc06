"""Where the scheduler's process spends its time on rows: totals of calls, written to $KIT_TIMING every half second.

A plugin of SGLang's that prepare.sh puts beside ours.
"""

import functools
import json
import os
import sys
import threading
import time

totals = {}


def timed(owner, name, label=None):
    original = getattr(owner, name)
    label = label or f"{getattr(owner, '__name__', owner)}.{name}"
    mine = totals.setdefault(label, [0, 0.0, 0.0])

    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            took = time.perf_counter() - began
            mine[0] += 1
            mine[1] += took
            mine[2] = max(mine[2], took)

    setattr(owner, name, wrapper)


def dump(path):
    path = f"{path}.{os.getpid()}"
    while True:
        time.sleep(0.5)
        found = {
            k: {
                "calls": c,
                "total, s": round(t, 4),
                "mean, us": round(1e6 * t / max(c, 1), 1),
                "most, ms": round(1e3 * m, 2),
            }
            for k, (c, t, m) in totals.items()
            if c
        }
        try:
            import torch

            found["pinned memory"] = {
                k: v
                for k, v in torch.cuda.host_memory_stats().items()
                if k.split(".")[0] in ("num_host_alloc", "num_host_free")
                or "host_alloc_time" in k
                or k in ("allocated_bytes.current", "allocated_bytes.peak")
            }
        except Exception as e:
            found["pinned memory"] = repr(e)
        if not totals["Scheduler.run_batch"][0]:
            continue
        with open(path + ".tmp", "w") as f:
            json.dump(found, f, indent=1)
        os.replace(path + ".tmp", path)


def register():
    if "KIT_TIMING" not in os.environ or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.managers import scheduler as s

    from sglang_probe.engine.capture import graph_taps, host_ring
    from sglang_probe.engine.hooks import session
    from sglang_probe.engine.hooks.instruments import accelerator
    from sglang_probe.engine.ledger import part, recorder, writer
    from sglang_probe.run import journal

    timed(host_ring.HostRing, "copy")
    timed(graph_taps.Snapshot, "send")
    timed(graph_taps.GraphTaps, "arm")
    timed(graph_taps.GraphTaps, "snapshot")
    timed(graph_taps.Snapshot, "finish")
    timed(accelerator, "arrived")
    timed(writer.Writer, "put")
    for owner in (session.Session, recorder.Recorder):
        for name, f in list(vars(owner).items()):
            if callable(f) and not name.startswith("__") and not isinstance(f, (property, staticmethod, classmethod)):
                timed(owner, name)
    timed(writer.Writer, "_write_part", "writer thread: _write_part")
    timed(part.OpenPart, "take", "writer thread: take")
    timed(journal, "write_durably", "writer thread: write_durably")
    timed(s.Scheduler, "run_batch")
    timed(s.Scheduler, "process_batch_result")
    timed(s.Scheduler, "get_next_batch_to_run")
    threading.Thread(target=dump, args=(os.environ["KIT_TIMING"],), daemon=True).start()
