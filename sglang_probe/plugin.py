"""The two entry points SGLang calls. Nothing else in the package registers anything with it.

SGLang loads both in every process it starts (`sglang/srt/plugins/__init__.py`). Without `SGLANG_PROBE` in the
environment, `register` returns at once: nothing is imported, patched or written.
"""

from __future__ import annotations

import os


def register() -> None:
    """General plugin: install the hooks that the config needs.

    Raises:
        SystemExit: the config or the installed SGLang is refused. SGLang would log any other exception and serve on
            without the probe, which is not what somebody who set `SGLANG_PROBE` asked for.
    """
    path = os.environ.get("SGLANG_PROBE")  # `CONFIG_VARIABLE` of engine/hooks/config.py, which is not loaded in vain
    if not path:
        return
    from sglang_probe.engine.hooks import install
    from sglang_probe.errors import ProbeError

    try:
        install.install(path)
    except ProbeError as e:
        raise SystemExit(f"sglang-probe refuses to start: {e}") from e


def activate_cpu_platform() -> str | None:
    """Platform plugin: name the CPU reference platform where no accelerator is present or may be used, else None."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None  # the user asked for SGLang's own CPU platform
    from sglang_probe.engine.platform.environment import (
        accelerator_present,
        choose_cpu,
        cpu_chosen,
        set_process_defaults,
    )
    from sglang_probe.engine.releases import release

    if accelerator_present():
        return None
    if cpu_chosen():
        choose_cpu(os.environ)
    platform = release().cpu_platform
    set_process_defaults(os.environ)
    return platform
