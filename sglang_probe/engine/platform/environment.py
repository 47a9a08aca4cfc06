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
from collections.abc import Mapping, MutableMapping

from sglang_probe import bf16
from sglang_probe.engine.releases import release
from sglang_probe.errors import ConfigError
from sglang_probe.paths import cache_dir

_DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/davinci[0-9]*", "/dev/dxg")

_BINDING = "SGLANG_CPU_OMP_THREADS_BIND"


DEVICE = "SGLANG_PROBE_DEVICE"
"""`cpu`: leave the accelerator of this machine alone and use the CPU reference platform."""

_HIDE = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "ASCEND_RT_VISIBLE_DEVICES": "-1"}
"""SGLang asks PyTorch in many places whether there is a GPU, and takes its kernels then, whatever the platform."""


def cpu_chosen(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the user asked for the CPU although there may be an accelerator.

    Raises:
        ConfigError: `SGLANG_PROBE_DEVICE` is set to something else.
    """
    chosen = env.get(DEVICE) or ""
    if chosen not in ("", "cpu"):
        raise ConfigError(f"{DEVICE}={chosen} is not known", fix="set it to cpu, or not at all")
    return chosen == "cpu"


def choose_cpu(env: MutableMapping[str, str]) -> None:
    """Let this process, if it has not used a GPU yet, and its children see no accelerator."""
    env[DEVICE] = "cpu"
    env.update(_HIDE)


def accelerator_present() -> bool:
    """Whether this machine has a GPU or NPU, seen by PyTorch or as a device file, that may be used.

    The device files count on purpose: a machine whose GPU is hidden or whose driver is broken must get an error from
    SGLang, not a silent fall-back to a slow reference platform. Who wants that says so (`SGLANG_PROBE_DEVICE=cpu`, or
    `device: cpu` under `server:`).
    """
    if cpu_chosen():
        return False
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


def platform_facts() -> dict[str, str]:
    """What computes here, for the manifest: `device`, and on the CPU in which type bf16 matrices are multiplied."""
    if accelerator_present():
        return {"device": "accelerator"}
    return {"device": "cpu", "bf16_products": bf16.products() if release().cpu_widens else "bf16"}


def prepare_this_process() -> None:
    """Apply the defaults to the running interpreter too, before it imports SGLang, and leave out what SGLang says at
    import about hardware that this machine does not have, or that it was told to leave alone."""
    if cpu_chosen():
        choose_cpu(os.environ)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"sglang\.")
    # `Engine.shutdown` ends all child processes, Python's own among them, which is started anew.
    warnings.filterwarnings("ignore", message="resource_tracker: process died unexpectedly")
    changed = set_process_defaults(os.environ)
    if "PYTHONPYCACHEPREFIX" in changed:
        sys.pycache_prefix = changed["PYTHONPYCACHEPREFIX"]
        sys.dont_write_bytecode = False
