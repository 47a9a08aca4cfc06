"""What makes the CPU reference platform usable: one OpenMP thread and a bytecode cache.

Measured on two cores: with the default thread count, decode at 32 concurrent requests runs at 37 to 430 tokens/s
instead of about 1,350, because PyTorch's threads fight the scheduler's; and SGLang imports about 7,000 modules in
each of three processes, which without cached bytecode takes 30 s of compilation apiece.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import MutableMapping

from sglang_probe.paths import cache_dir

_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/davinci[0-9]*", "/dev/dxg")


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


def prepare_this_process() -> None:
    """Apply the defaults to the running interpreter too, before it imports SGLang."""
    changed = set_process_defaults(os.environ)
    if "PYTHONPYCACHEPREFIX" in changed:
        sys.pycache_prefix = changed["PYTHONPYCACHEPREFIX"]
        sys.dont_write_bytecode = False
