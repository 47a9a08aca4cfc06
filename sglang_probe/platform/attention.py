"""PyTorch attention that does not pay for a cached prefix twice.

SGLang's `torch_native` backend pads the queries behind a cached prefix to the full length and throws the padding's
output away, so that a hit saves no attention. This one asks for the new queries only, with the mask that the padding
implied; PyTorch's CPU kernel computes each query by itself, so the bits are the same
(`tests/engine/test_switches.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch.nn.functional import scaled_dot_product_attention


class ProbeTorchBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """`torch_native` with unpadded prefill. Windows and cross attention are left to the stock code."""

    def _run_sdpa_forward_extend(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        """Attention of the new tokens of each request; shapes as in the stock method."""
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None or not causal:
            stock: Any = super()._run_sdpa_forward_extend
            result: torch.Tensor = stock(
                query,
                output,
                k_cache,
                v_cache,
                req_to_token,
                req_pool_indices,
                seq_lens,
                extend_prefix_lens,
                extend_seq_lens,
                encoder_lens,
                scaling=scaling,
                enable_gqa=enable_gqa,
                causal=causal,
                is_cross_attn=is_cross_attn,
                sliding_window_size=sliding_window_size,
            )
            return result
        start = 0
        lengths = zip(
            req_pool_indices.tolist(),
            seq_lens.tolist(),
            extend_prefix_lens.tolist(),
            extend_seq_lens.tolist(),
            strict=True,
        )
        for request, total, prefix, new in lengths:
            slots = req_to_token[request, :total]
            q_HND = query[start : start + new].transpose(0, 1)
            k_GLD = k_cache[slots].transpose(0, 1).to(query.dtype)
            v_GLD = v_cache[slots].transpose(0, 1).to(query.dtype)
            mask = None
            if prefix:
                mask = torch.arange(total)[None, :] <= torch.arange(prefix, total)[:, None]
            out_HND = scaled_dot_product_attention(
                q_HND[None],
                k_GLD[None],
                v_GLD[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=enable_gqa,
                scale=scaling,
            )[0]
            output[start : start + new] = out_HND.transpose(0, 1)
            start += new
        return output
