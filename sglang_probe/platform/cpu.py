"""Stock SGLang on a plain CPU: a reference for correctness, not for speed.

SGLang selects an out-of-tree platform when one is registered; its own CPU platform needs kernels that its registry
package does not carry. This one subclasses it and points at `torch_native` attention. Imported by SGLang only, after
`sglang_probe.plugin.activate_cpu_platform` has found no accelerator.
"""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities


class ReferenceCpuPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """`CpuSRTPlatform` as an out-of-tree platform: PyTorch-only operators, eager execution."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(graph_capture=False)

    def get_default_attention_backend(self) -> str:
        return "torch_native"
