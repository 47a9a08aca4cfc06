"""The CPU reference platform on SGLang 0.5.17 and 0.5.21, which ask an out-of-tree platform for classes that 0.5.23
defaults.

Their page allocator is a Triton kernel, and they write the rows of its KV slots with another one unless the attention
backend is `torch_native` (`utils/common.py`, `support_triton`): so that `probe_torch` cannot be chosen here.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_probe.engine.platform.defaults import apply_cpu_defaults


class ReferenceCpuPlatform(CpuSRTPlatform):  # type: ignore[misc]
    """`CpuSRTPlatform` as an out-of-tree platform: PyTorch-only operators, eager execution."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """As in `engine/platform/cpu.py`."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """As in `engine/platform/cpu.py`."""
        apply_cpu_defaults(server_args)

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool  # type: ignore[no-any-return]

    def get_paged_allocator_cls(self) -> Any:
        """SGLang calls the result; with pages of one token it takes an allocator of another signature elsewhere."""
        return _allocator


def _allocator(size: int, *, page_size: int, **options: Any) -> Any:
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator, alloc_extend_naive
    from sglang.srt.utils import get_num_new_pages

    if page_size == 1:
        return TokenToKVPoolAllocator(size, **options)

    class TorchPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
        """SGLang's page allocator, its two kernels written with PyTorch."""

        free_pages: torch.Tensor

        def alloc_extend(
            self,
            prefix_lens: torch.Tensor,
            prefix_lens_cpu: torch.Tensor,
            seq_lens: torch.Tensor,
            seq_lens_cpu: torch.Tensor,
            last_loc: torch.Tensor,
            extend_num_tokens: int,
            num_new_pages: int | None = None,
        ) -> torch.Tensor | None:
            pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu)
            if pages > len(self.free_pages):
                return None
            slots = torch.empty((extend_num_tokens,), dtype=torch.int64)
            alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
            self.free_pages = self.free_pages[pages:]
            return slots

        def alloc_decode(
            self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
        ) -> torch.Tensor | None:
            opens = (seq_lens - 1) % self.page_size == 0
            pages = int(opens.sum())
            if pages > len(self.free_pages):
                return None
            slots = last_loc.to(torch.int64) + 1  # of `req_to_token`, which is int32
            slots[opens] = self.free_pages[:pages] * self.page_size
            self.free_pages = self.free_pages[pages:]
            return slots

    return TorchPagedAllocator(size, page_size=page_size, **options)
