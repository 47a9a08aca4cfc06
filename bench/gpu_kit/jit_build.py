"""Builds the JIT kernels of SGLang 0.5.17 that a dense bf16 Llama uses, into $TVM_FFI_CACHE_DIR.

SGLang itself is not imported. argv: site folder, head_dim, bytes of a key row (kv_heads * head_dim * 2), [kernels].
FAKE_SM90=1: without a GPU, for sm_90a. Names, sources and flags are those of `attention/clamp_position`,
`attention/rope`, `kvcache/kvcache` and `activation/activation` in `sglang/kernels/ops`, so that `load_jit` finds them
by content.
"""

import os
import sys
import time
import types

import torch

if os.environ.get("FAKE_SM90"):
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *a, **k: (9, 0)

SITE, HEAD, ROW = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
package = types.ModuleType("sglang")
package.__path__ = [f"{SITE}/sglang"]
utils = types.ModuleType("sglang.utils")
utils.is_in_ci = lambda: False
sys.modules.update({"sglang": package, "sglang.utils": utils})
sys.path.insert(0, SITE)

from sglang.kernels.jit.utils import is_arch_support_pdl, load_jit, make_cpp_args  # noqa: E402


def clamp():
    args = make_cpp_args(torch.int64)
    load_jit(
        "clamp_position",
        *args,
        cuda_files=["elementwise/clamp_position.cuh"],
        cuda_wrappers=[("clamp_position", f"ClampPosition<{args}>::run")],
    )


def rope():
    args = make_cpp_args(True, HEAD, is_arch_support_pdl(), torch.bfloat16, torch.bfloat16)
    kernel = f"FusedRopeKernel<{args}>"
    load_jit(
        "fused_rope",
        *args,
        cuda_files=["elementwise/rope.cuh"],
        cuda_wrappers=[("run_rope", f"{kernel}::run"), ("run_rope_store", f"{kernel}::run_fused")],
    )


def kv():
    args = make_cpp_args(ROW, ROW, is_arch_support_pdl())
    load_jit(
        "kvcache",
        *args,
        cuda_files=["elementwise/kvcache.cuh"],
        cuda_wrappers=[("store_cache", f"StoreKVCacheKernel<{args}>::run")],
    )


def act():
    args = make_cpp_args(torch.bfloat16, is_arch_support_pdl())
    names = ["activation", "activation_with_rounding", "activation_with_rounding_input_inplace", "activation_filtered"]
    load_jit(
        "activation",
        *args,
        cuda_files=["elementwise/activation.cuh"],
        extra_cuda_cflags=["--use_fast_math"],
        cuda_wrappers=[(f"run_{n}", f"ActivationKernel<{args}>::run_{n}") for n in [*names, "unary_activation"]],
    )


for name in sys.argv[4:] or ["clamp", "rope", "kv", "act"]:
    began = time.time()
    {"clamp": clamp, "rope": rope, "kv": kv, "act": act}[name]()
    print(name, "ready in", round(time.time() - began, 1), "s", flush=True)
