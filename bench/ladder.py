"""Which configurations of SGLang run on the CPU reference platform at all: `python bench/ladder.py --out ladder.json`.

One tiny model with random weights an architecture, stock SGLang with the platform and without the recorder: starts,
serves the same prompt twice and a longer one, and says whether the second answer is the first's. What fails is told by
the last line of SGLang's in the traceback. A few seconds a configuration on an idle core, after one import of SGLang.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.attack.latent import LATENT, ROUTING

_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
_WINDOWED = {"sliding_window": 32, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: (class of the configuration in transformers, architecture, fields beside `_TINY`)
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"sliding_window": 32, "query_pre_attn_scalar": 16, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_WINDOWED, "query_pre_attn_scalar": 16}),
    "mellum": (
        "MellumConfig",
        "MellumForCausalLM",
        {**_WINDOWED, **_EXPERTS, "num_experts": 4, "mlp_layer_types": ["dense"] * 4, "rope_parameters": None},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_WINDOWED,
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 512,
        },
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**_WINDOWED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "full_attention_interval": 4,  # what SGLang's own configuration reads
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**_EXPERTS, **LATENT, **ROUTING}),
}
_SPECULATIVE = {"speculative_num_draft_tokens": 4}
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (model, server arguments)
    "plain": ("llama", {}),
    "sliding windows, one pool (Gemma 2)": ("gemma2", {}),
    "sliding windows, one pool (Gemma 3)": ("gemma3", {}),
    "sliding windows, a pool of their own (Mellum)": ("mellum", {}),
    "sliding windows, a pool of their own (Gemma 4)": ("gemma4", {}),
    "sliding windows and sinks (gpt-oss)": ("gpt_oss", {}),
    "linear attention and full (Qwen3-Next)": (
        "qwen3_next",
        {"mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True},
    ),
    "MLA (DeepSeek V3)": ("deepseek_v3", {}),
    "LoRA": (
        "llama",
        {"enable_lora": True, "lora_backend": "torch_native", "lora_paths": "ADAPTER", "load_format": "auto"},
    ),
    "n-gram speculation": ("llama", {"speculative_algorithm": "NGRAM", **_SPECULATIVE}),
    "EAGLE-style speculation": (
        "llama",
        {
            "speculative_algorithm": "EAGLE",
            "speculative_draft_model_path": "MODEL",
            "speculative_num_steps": 3,
            "speculative_eagle_topk": 1,
            **_SPECULATIVE,
        },
    ),
    "HiCache": ("llama", {"enable_hierarchical_cache": True, "hicache_ratio": 2.0}),
    "DP attention": ("llama", {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}),
    "disaggregation, prefill": ("llama", {"disaggregation_mode": "prefill"}),
    "disaggregation, decode": (
        "llama",
        {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "fake"},
    ),
    "pipeline parallelism": ("llama", {"pp_size": 2}),
    "torch.compile": ("llama", {"enable_torch_compile": True}),
}
_ALWAYS = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_total_tokens": 2048,
    "chunked_prefill_size": 64,
    "log_level": "info",
    "disable_cuda_graph": True,
    "random_seed": 1,
}
_SECONDS = 100
_LINE = re.compile(r'File "[^"]*?/(sglang/[^"]+)", line (\d+), in (\w+)')


def main() -> None:
    """Try every rung in a process of its own, forked from this one, and write what became of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="rungs whose name contains this")
    args = parser.parse_args()
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # for two ranks on one memory node
    import sglang.srt.entrypoints.engine
    import sglang.srt.managers.detokenizer_manager
    import sglang.srt.managers.scheduler  # noqa: F401

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ladder-") as name:
        for rung in (r for r in RUNGS if args.only is None or args.only in r):
            began = time.perf_counter()
            found[rung] = _tried(rung, Path(name)) | {"seconds": round(time.perf_counter() - began, 1)}
            print(rung, json.dumps(found[rung]), flush=True)
            args.out.write_text(json.dumps(found, indent=2) + "\n")


def make_model(name: str, folder: Path) -> Path:
    """A folder with the configuration of a model of random weights."""
    import transformers

    kind, architecture, fields = MODELS[name]
    config = getattr(transformers, kind)(**{**_TINY, **fields})
    config.architectures = [architecture]
    config.save_pretrained(folder / name)
    if name == "llama":  # adapters are loaded as the model is, from files
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder / name


def _adapter(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**told, "task_type": "CAUSAL_LM"}))
    tensors = {}
    for layer in range(_TINY["num_hidden_layers"]):  # type: ignore[call-overload]
        for module, out in (("q_proj", 64), ("v_proj", 32)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(4, 64) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn(out, 4) * 0.3
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def _tried(rung: str, folder: Path) -> dict[str, Any]:
    log, answer = folder / "log", folder / "answer"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("wb") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        try:
            answer.write_text(json.dumps(_served(rung, folder)))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os.killpg(0, signal.SIGKILL)
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.2)
    try:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    if answer.exists():
        return {"runs": True, **json.loads(answer.read_text())}
    text = log.read_text(errors="replace")
    return {"runs": False, **_why(text), "ended": text.count("Traceback") > 0, "tail": text[-1500:]}


def _why(text: str) -> dict[str, Any]:
    """The first error of a log and the last line of SGLang's above it."""
    error = re.search(r"^(?:\[[^\]]*\] )?(\w*(?:Error|Exception|Failure|Interrupt)\b.*)$", text, re.MULTILINE)
    above = _LINE.findall(text[: error.start()] if error else text)
    at = f"{above[-1][0]}:{above[-1][1]} {above[-1][2]}" if above else None
    return {"error": error[1][:300] if error else None, "at": at}


def _served(rung: str, folder: Path) -> dict[str, Any]:
    model, server = RUNGS[rung]
    path = make_model(model, folder)
    given = {
        k: [f"one={_adapter(folder)}"] if v == "ADAPTER" else str(path) if v == "MODEL" else v
        for k, v in server.items()
    }
    from sglang.srt.entrypoints import engine

    set_up = engine._set_envs_and_config

    def forking(*args: Any, **kwargs: Any) -> None:
        set_up(*args, **kwargs)
        multiprocessing.set_start_method("fork", force=True)

    engine._set_envs_and_config = forking
    started = engine.Engine(model_path=str(path), **{**_ALWAYS, **given})
    more = {"lora_path": "one"} if "lora_paths" in given else {}
    if given.get("disaggregation_mode"):
        more = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 1}
    prompt = [3 + (7 * i) % 500 for i in range(150)]
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    answers = [
        started.generate(input_ids=p, sampling_params=sampling, **more) for p in (prompt, prompt, prompt + [9] * 70)
    ]
    ids = [a["output_ids"] for a in answers]
    return {"same": ids[0] == ids[1], "cached": [a["meta_info"]["cached_tokens"] for a in answers]}


if __name__ == "__main__":
    main()
