"""What makes the CPU reference platform usable: one OpenMP thread and a bytecode cache.

Measured on two cores: with the default thread count, decode at 32 concurrent requests runs at 37 to 430 tokens/s
instead of about 1,350, because PyTorch's threads fight the scheduler's; and SGLang imports about 7,000 modules in
each of three processes, which without cached bytecode takes 30 s of compilation apiece.
"""

from __future__ import annotations

import glob
import os
import sys
import warnings
from collections.abc import MutableMapping

from sglang_probe.paths import cache_dir

_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/davinci[0-9]*", "/dev/dxg")

_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"


def accelerator_present() -> bool:
    """Whether this machine has a GPU or NPU, seen by PyTorch or as a device file.

    The device files count on purpose: a machine whose GPU is hidden or whose driver is broken must get an error from
    SGLang, not a silent fall-back to a slow reference platform.
    """
    if any(glob.glob(pattern) for pattern in _DEVICE_FILES):
        return True
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return True
    mps = getattr(torch.backends, "mps", None)
    npu = getattr(torch, "npu", None)
    return bool((mps and mps.is_available()) or (npu and npu.is_available()))


def set_process_defaults(env: MutableMapping[str, str]) -> dict[str, str]:
    """Set what the user has not set, for this process's children. Returns what was changed.

    `PYTHONDONTWRITEBYTECODE` is lifted only together with a cache folder of our own (`PYTHONPYCACHEPREFIX`), so no
    file appears beside anybody's sources.
    """
    changed: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in env:
        changed["OMP_NUM_THREADS"] = "1"
    if "PYTHONPYCACHEPREFIX" not in env:
        changed["PYTHONPYCACHEPREFIX"] = str(cache_dir() / "pycache")
        env.pop("PYTHONDONTWRITEBYTECODE", None)
    env.update(changed)
    return changed


def bind_cpus(env: MutableMapping[str, str], ranks: int) -> None:
    """Give each of several ranks its share of this machine's CPUs, unless the user said how (`0|1` for two).

    SGLang binds a rank to a NUMA node otherwise, and refuses more ranks than there are nodes
    (`utils/numa_utils.py`).
    """
    if ranks > 1 and _BINDING not in env and not accelerator_present():
        cpus = sorted(os.sched_getaffinity(0))
        shares = [cpus[i::ranks] or [cpus[i % len(cpus)]] for i in range(ranks)]
        env[_BINDING] = "|".join(",".join(map(str, share)) for share in shares)


def prepare_this_process() -> None:
    """Apply the defaults to the running interpreter too, before it imports SGLang, and leave out what SGLang says at
    import about hardware that this machine does not have."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"sglang\.")
    # `Engine.shutdown` ends all child processes, Python's own among them, which is started anew.
    warnings.filterwarnings("ignore", message="resource_tracker: process died unexpectedly")
    changed = set_process_defaults(os.environ)
    if "PYTHONPYCACHEPREFIX" in changed:
        sys.pycache_prefix = changed["PYTHONPYCACHEPREFIX"]
        sys.dont_write_bytecode = False
