"""Which engine configurations the ledger is proved for. Everything else is refused by name."""

from __future__ import annotations

from typing import Any

from sglang_probe.engine.releases import release
from sglang_probe.errors import UnsupportedError

_REFUSED: dict[str, tuple[Any, str]] = {
    # server argument: (value that is fine, what it turns on otherwise)
    "pp_size": (1, "pipeline parallelism"),
    "enable_dp_attention": (False, "data-parallel attention"),
    "ep_size": (1, "expert parallelism"),
    "attn_cp_size": (1, "context parallelism"),
    "dcp_size": (1, "decode context parallelism"),
    "enable_prefill_cp": (False, "prefill context parallelism"),
    "nnodes": (1, "serving over several machines"),
    "speculative_algorithm": (None, "speculative decoding"),
    "disaggregation_mode": ("null", "prefill-decode disaggregation"),
    "enable_hierarchical_cache": (False, "the hierarchical cache"),
    "enable_lmcache": (False, "LMCache"),
    "enable_lora": (False, "LoRA"),
    "dllm_algorithm": (None, "diffusion language models"),
    "is_embedding": (False, "embedding models"),
    "enable_torch_compile": (False, "torch.compile"),
    "enable_pdmux": (False, "prefill-decode multiplexing"),
    "enable_two_batch_overlap": (False, "two-batch overlap"),
    "enable_session_radix_cache": (False, "session radix cache"),
    "enable_streaming_session": (False, "streaming sessions, which keep entries outside the radix tree"),
    "strip_thinking_cache": (False, "freeing the entries of a model's thinking"),
    "enable_flexkv": (False, "FlexKV"),
    "radix_cache_backend": (None, "a radix cache of another package"),
    "enable_hisparse": (False, "the hierarchical sparse cache"),
    "encoder_only": (False, "encoder-only serving"),
}

_FALSY_FINE = (None, False, "", "null")


def refuse_unsupported(server_args: Any) -> None:
    """Refuse a configuration whose accounting is not proved.

    Args:
        server_args: SGLang's resolved `ServerArgs`, or a mapping of the arguments a user gave.

    Raises:
        UnsupportedError: names every refused argument.
    """
    get = server_args.get if isinstance(server_args, dict) else lambda k, d=None: getattr(server_args, k, d)
    found = []
    for name, (fine, what) in {**_REFUSED, **release().refused}.items():
        value = get(name, fine)
        if value != fine and not (fine in _FALSY_FINE and value in _FALSY_FINE):
            found.append(f"{what} (`{name}: {value}`)")
    if found:
        raise UnsupportedError(
            "the accounting is not proved for " + ", ".join(found),
            fix="leave these arguments at their defaults, or run without the probe",
        )
