"""Stock SGLang on a plain CPU: a reference for correctness, not for speed.

SGLang selects an out-of-tree platform when one is registered; its own CPU platform needs kernels that its registry
package does not carry. This one subclasses it and points at attention in PyTorch. Imported by SGLang only, after
`sglang_probe.plugin.activate_cpu_platform` has found no accelerator, or was told to leave it alone.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities

from sglang_probe.engine.platform.defaults import apply_cpu_defaults
from sglang_probe.engine.platform.limits import PROBE_TORCH

if PROBE_TORCH not in ATTENTION_BACKEND_CHOICES:
    add_attention_backend_choices([PROBE_TORCH])


class ReferenceCpuPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """`CpuSRTPlatform` as an out-of-tree platform: PyTorch-only operators, eager execution.

    The default attention is `attention.py` beside this file; `--attention-backend torch_native` chooses SGLang's own.
    """

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities(graph_capture=False)

    def get_device(self, device_id: int = 0) -> str:
        """A name, as SGLang's interface declares and a server without `--device` needs; its own returns an object."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return PROBE_TORCH

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """For servers that were started without our defaults; SGLang calls it before it sizes anything."""
        apply_cpu_defaults(server_args)

    def post_load_model(self, model: Any) -> None:
        """Once the weights are loaded: how this CPU multiplies them."""
        from sglang_probe.engine.platform.linear import widen

        widen(model)

    def init_backend(self) -> None:
        """Register the attention backend and operators; SGLang calls this when it imports its model runner."""
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from sglang_probe.engine.platform import operators

        operators.register(self.get_dispatch_key_name())

        @register_attention_backend(PROBE_TORCH)  # type: ignore[untyped-decorator]
        def create(runner: Any) -> Any:
            from sglang_probe.engine.platform.attention import ProbeTorchBackend

            if runner.use_mla_backend:
                _attend_latently()
            return ProbeTorchBackend(runner)


def _attend_latently() -> None:
    """Models with latent attention compute every forward in the latent space. SGLang's default computes a prompt with
    nothing cached from keys and values that are in no cache, which PyTorch's attention there does not read."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handler

    handler.AttentionBackendRegistry.register(PROBE_TORCH, handler._dispatch_mla_subtype)
