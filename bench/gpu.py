"""What has to be shown on a GPU: run it there, and send the JSON.

    python bench/gpu.py [--out runs/gpu] [--steps replay overhead] [--again] [--model DIR | --shape 8b]

Steps, each with a JSON of its own in the output folder; a step whose JSON is there is not run again:

* model: a Llama shape of 1.2 B parameters with random weights, made here (`--model` takes another checkpoint; with
  `--shape 8b` SGLang makes the weights of an 8 B shape itself, which is enough for `overhead`).
* prove: `sglang-probe prove` with the same server arguments; the next two need its certificate.
* replay: 96 requests of mixed lengths, 64 at a time, with CUDA graphs and without, twice each, with the same tokens.
  Every invariant of `verify` with the ownership oracle, the share of forwards that were replayed, rows with graphs
  against rows without beside the difference of each arm to itself, and rows against `transformers`.
* deterministic: the difference of an arm to itself under `enable_deterministic_inference` with the Triton backend.
* overhead: decode throughput at batch 32 relative to stock SGLang, graphs on: installed, ledger, residuals of 4 layers,
  queries of 4 layers; bytes of rows per second beside what pinned copies reach.
* kernel: the telemetry kernel against the reference, and its time.

`--rehearse` runs the steps on a CPU with a tiny model and few requests: it tests this script and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.harvest.engine import default_server_args
from sglang_probe.paths import shipped
from sglang_probe.run import journal
from sglang_probe.run.run import load_run

NO_GPU = (
    "bench-gpu needs an NVIDIA GPU that PyTorch can use, and this machine has none; nothing was run. "
    "(`python bench/gpu.py --rehearse` tests the script itself on a CPU.)"
)
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TOKENIZER = "models/probe-text/checkpoint"


class Bench:
    """Paths and sizes of one invocation."""

    def __init__(
        self,
        out: Path,
        model: Path | None,
        rehearse: bool,
        server: dict[str, Any] | None = None,
        rounds: int = 3,
        requests: int = 96,
        shape: str = "1b",
        modes: list[str] | None = None,
    ) -> None:
        self.out, self.rehearse, self.shape, self.modes = out, rehearse, shape, modes
        self.server, self.rounds = {**(server or {}), **({} if shape == "1b" else {"load_format": "dummy"})}, rounds
        self.model = model or out / "model"
        self.requests, self.concurrent = (8, 4) if rehearse else (requests, min(requests, 64))

    @property
    def layers(self) -> list[int]:
        """Four layers, evenly spaced, the last included."""
        n = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
        return sorted({n * (i + 1) // 4 - 1 for i in range(4)})

    @property
    def residuals(self) -> list[str]:
        return [f"blocks.{i}.hook_resid_post" for i in self.layers]

    @property
    def queries(self) -> list[str]:
        return [f"blocks.{i}.attn.hook_rot_q" for i in self.layers]


def make_model(bench: Bench) -> dict[str, Any]:
    """Random weights in bf16, with the tokenizer of the built-in model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (bench.model / "config.json").exists():
        source = shipped(TOKENIZER)
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        shape = TINY if bench.rehearse else SHAPES[bench.shape]
        torch.manual_seed(0)
        config = LlamaConfig(
            **shape,
            num_key_value_heads=shape["num_attention_heads"] // 4,
            vocab_size=vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        if bench.shape == "1b":
            with torch.device("cpu"):
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(bench.model)
        else:
            config.architectures = ["LlamaForCausalLM"]
            config.save_pretrained(bench.model)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(source / name, bench.model / name)
    config = json.loads((bench.model / "config.json").read_text())
    return {k: config.get(k) for k in (*TINY, "num_key_value_heads", "architectures")}


def prove(bench: Bench) -> dict[str, Any]:
    """The certificate of this machine, without which rows are refused there."""
    if bench.shape != "1b":
        return {"skipped": "weights that SGLang makes itself cannot be compared with `transformers`"}
    few = ("--requests", "8", "--rounds", "1", "--transformers", "1") if bench.rehearse else ()
    path = bench.out / "certificate.json"
    server = ("--server", json.dumps(bench.server))
    done = _cli("prove", "--model", bench.model, *server, "--output", path, *few, check=False)
    if not path.exists():
        raise SystemExit(f"prove failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return json.loads(path.read_text())


def replay(bench: Bench) -> dict[str, Any]:
    """Graphs against eager, beside the floors; ownership, invariants and `transformers`."""
    folder = _experiment(bench, "replay", {"graphs": {}, "eager": {"server": {"disable_cuda_graph": True}}})
    runs = {p.parent.name: load_run(p.parent) for p in sorted(folder.glob("*/manifest.json"))}
    reference = _cli("verify", runs["graphs"].path, "--transformers", "4", check=False)
    shares = {name: run.forwards().groupby("mode")["graph"].mean().to_dict() for name, run in runs.items()}
    return {
        "requests": bench.requests,
        "concurrent": bench.concurrent,
        "rows": {name: run.row_count() for name, run in runs.items()},
        "share of forwards replayed": shares,
        "verify with transformers": {"passed": reference.returncode == 0, "output": reference.stdout[-3000:]},
        "summary": json.loads((folder / "summary.json").read_text()),
    }


def deterministic(bench: Bench) -> dict[str, Any]:
    """The floor where the engine is asked to be deterministic."""
    if bench.rehearse:
        return {"skipped": "SGLang has no deterministic mode on a CPU"}
    server = {"enable_deterministic_inference": True, "attention_backend": "triton"}
    folder = _experiment(
        bench, "deterministic", {"graphs": {"server": server}, "cache_off": {"cache": "off", "server": server}}
    )
    return {"summary": json.loads((folder / "summary.json").read_text())}


def _experiment(bench: Bench, name: str, arms: dict[str, Any]) -> Path:
    """Run `sglang-probe ab`, going on where an earlier attempt stopped."""
    folder = bench.out / name
    prompts = bench.out / "prompts.jsonl"
    if not prompts.exists():
        prompts.write_text("".join(json.dumps(line) + "\n" for line in _prompts(bench.requests)))
    experiment = bench.out / f"{name}.yaml"
    config = {
        "model": str(bench.model),
        "simulated_graphs": bench.rehearse,
        "server": bench.server,
        "workload": {"source": "jsonl", "path": str(prompts)},
        "hook_points": ["hook_embed", *bench.residuals, *bench.queries],
        "sampling": {"temperature": 1.0, "ignore_eos": True, "max_new_tokens": 64},
        "concurrency": bench.concurrent,
        "replicates": 2,
        "arms": arms,
    }
    experiment.write_text(yaml.safe_dump(config, sort_keys=False))
    # A violated invariant is a result, and `ab` says so by its exit code; without a summary it did not get that far.
    done = _cli("ab", experiment, "--output", folder, *(["--resume"] if folder.exists() else []), check=False)
    if not (folder / "summary.json").exists():
        raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}")
    return folder


def _prompts(n: int) -> list[dict[str, Any]]:
    """Lengths from a few to some 2,000 tokens and 8 to 128 of output; every third shares the head of another."""
    rng = random.Random(0)
    words = Path(__file__).read_text().split()
    shared = " ".join(rng.choices(words, k=100))
    return [
        {
            "prompt": (shared if i % 3 == 0 else "") + " ".join(rng.choices(words, k=rng.choice((3, 20, 120, 400)))),
            "sampling_params": {"max_new_tokens": rng.choice((8, 32, 128))},
        }
        for i in range(n)
    ]


def overhead(bench: Bench) -> dict[str, Any]:
    """Rounds of every mode in shuffled order, each in a fresh engine; ratios within a round."""
    modes: dict[str, list[str] | None] = {
        "stock": None,
        "installed": None,
        "ledger": [],
        "residuals of 4 layers": bench.residuals,
        "queries of 4 layers": bench.queries,
    }
    modes = {m: modes[m] for m in bench.modes or modes}
    rng = random.Random(1)
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(1 if bench.rehearse else bench.rounds):
        order = list(modes)
        rng.shuffle(order)
        rounds.append({})
        for m in order:
            rounds[-1][m] = _measured(bench, m, modes[m])
            (bench.out / "overhead-rounds.json").write_text(json.dumps(rounds, indent=2))  # should the time end here
    ratios = {m: [r[m]["decode tok/s"] / r["stock"]["decode tok/s"] for r in rounds] for m in modes}
    return {
        "rounds": rounds,
        "median ratio to stock": {m: statistics.median(r) for m, r in ratios.items()},
        "goals": {"ledger": 0.99, "residuals of 4 layers": 0.95, "queries of 4 layers": 0.95},
        "pinned copy, bytes/s": _copy_rate(),
    }


def _measured(bench: Bench, mode: str, hook_points: list[str] | None) -> dict[str, Any]:
    task = json.dumps(
        {
            "mode": mode,
            "hook_points": hook_points,
            "model": str(bench.model),
            "rehearse": bench.rehearse,
            "server": bench.server,
        }
    )
    out = subprocess.run([sys.executable, __file__, "--measure", task], capture_output=True, text=True, check=False)
    lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{mode} failed:\n{out.stdout[-2000:]}\n{out.stderr[-5000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Throughput of one engine, in a process of its own."""
    count, prompt, output, passes = (4, 16, 96, 1) if task["rehearse"] else (32, 256, 256, 5)
    with tempfile.TemporaryDirectory() as folder:
        if task["mode"] == "stock":
            os.environ["SGLANG_PLUGINS"] = "sglang_probe_cpu"
        if task["hook_points"] is not None:
            config = Path(folder) / "probe.yaml"
            probe = EngineProbeConfig(
                run=Path(folder),
                hook_points=task["hook_points"],
                proving=True,  # what rows cost is measured whether they are proved or not
                simulated_graphs=task["rehearse"],
                checkpoint_seconds=0.05 if task["rehearse"] else 2,  # `Engine.shutdown` waits for nothing
            )
            config.write_text(probe.model_dump_json())
            os.environ["SGLANG_PROBE"] = str(config)
        import sglang

        server = {**default_server_args(), **task["server"]}
        engine = sglang.Engine(model_path=task["model"], log_level="error", **server)
        rng, seconds = random.Random(0), []
        for _ in range(passes + 1):
            prompts = [[rng.randrange(100, 3000) for _ in range(prompt)] for _ in range(count)]
            params = {"max_new_tokens": output, "temperature": 0.0, "ignore_eos": True}
            began = time.perf_counter()
            engine.generate(input_ids=prompts, sampling_params=params)
            seconds.append(time.perf_counter() - began)
        engine.shutdown()
        wall = statistics.median(seconds[1:])
        rows = sum(p.stat().st_size for p in Path(folder).glob("rows/*/*.safetensors"))
        if task["hook_points"] is not None and not (Path(folder) / journal.NAME).exists():
            raise SystemExit(f"{task['mode']}: nothing was recorded")
    return {"decode tok/s": count * output / wall, "rows, bytes/s": rows / sum(seconds), "seconds": seconds}


def _copy_rate() -> float | None:
    """Bytes per second of one large copy from the device to pinned memory."""
    if not torch.cuda.is_available():
        return None
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source, device="cpu", pin_memory=True)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return source.nbytes / min(times)


def kernel(bench: Bench) -> dict[str, Any]:
    """32 requests of 4,096 keys, four sampled heads, a 1 B shape."""
    if bench.rehearse:
        return {"skipped": "the compiled kernel needs a GPU; test_attention_kernel.py interprets it"}
    from sglang_probe.attention.telemetry import entropy, mass_by_region
    from sglang_probe.attention.weights import AttentionSpec, attention_weights
    from sglang_probe.engine.capture.attention_kernel import attention_summary

    b, n, heads, kv_heads, dim = 32, 4096, 32, 8, 64
    torch.manual_seed(0)
    q = torch.randn(b, heads, dim, dtype=torch.bfloat16, device="cuda")
    pool = torch.randn(b * n, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(b * n, device="cuda").view(b, n).int()
    lengths = torch.full((b,), n, device="cuda")
    ends = torch.tensor([[4, 200, n - 256, n]], device="cuda").expand(b, -1)
    sampled = torch.tensor([0, 9, 18, 31], device="cuda")

    def once() -> Any:
        return attention_summary(q, pool, slots, lengths, ends, sampled, scaling=dim**-0.5, top_k=8)

    got = once()
    a = attention_weights(q[:1].cpu(), pool[slots[0].long()].cpu(), AttentionSpec(dim**-0.5), first=n - 1)
    a = a.flatten(0, 1)[sampled.cpu()]
    region = torch.bucketize(torch.arange(n), ends[0].cpu(), right=True)
    mass, h = mass_by_region(a, region, 4)[:, 0], entropy(a, n - 1).support.log()[:, 0]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        once()
    end.record()
    torch.cuda.synchronize()
    return {
        "milliseconds": start.elapsed_time(end) / 20,
        "largest error of a mass": float((got.mass()[0].cpu() - mass).abs().max()),
        "largest error of an entropy": float((got.entropy()[0].cpu() - h).abs().max()),
    }


STEPS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "model": make_model,
    "prove": prove,
    "replay": replay,
    "deterministic": deterministic,
    "overhead": overhead,
    "kernel": kernel,
}


def _cli(*args: object, check: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_probe", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=check, stdin=subprocess.DEVNULL)


def _machine(bench: Bench) -> dict[str, Any]:
    import importlib.metadata as metadata

    device = "none: a rehearsal on a CPU, whose figures mean nothing"
    return {
        "device": torch.cuda.get_device_name() if not bench.rehearse else device,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "versions": {p: metadata.version(p) for p in ("sglang", "torch", "triton", "transformers", "sglang-probe")},
        "command": " ".join(sys.argv),
    }


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="of the model that is made")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--again", action="store_true", help="run steps whose result is there")
    parser.add_argument("--rehearse", action="store_true", help="test this script on a CPU")
    parser.add_argument("--server", type=json.loads, default={}, help="SGLang server arguments of every engine, JSON")
    parser.add_argument("--requests", type=int, default=96, help="of the steps replay and deterministic")
    parser.add_argument("--rounds", type=int, default=3, help="of the step overhead")
    parser.add_argument("--modes", nargs="+", help="of the step overhead: stock and some others; default all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.shape != "1b" and set(args.steps) - {"model", "overhead"}:
        parser.error(f"--shape {args.shape} has no weights of its own: ask for `--steps overhead`")
    if args.measure:
        print("RESULT " + json.dumps(measure(json.loads(args.measure))))
        return
    if not args.rehearse and not (torch.cuda.is_available() and torch.version.hip is None):
        raise SystemExit(NO_GPU)
    model = args.model and args.model.resolve()
    bench = Bench(
        args.out.resolve(), model, args.rehearse, args.server, args.rounds, args.requests, args.shape, args.modes
    )
    bench.out.mkdir(parents=True, exist_ok=True)
    for name in STEPS:
        result = bench.out / f"{name}.json"
        if name != "model" and name not in args.steps:
            continue
        if args.again or not result.exists():
            print(f"{name} ...", flush=True)
            began = time.time()
            found = STEPS[name](bench)
            result.write_text(json.dumps({**_machine(bench), "seconds": time.time() - began, name: found}, indent=2))
        print(f"{name}: {result}", flush=True)
    everything = {p.stem: json.loads(p.read_text()) for p in (bench.out / f"{n}.json" for n in STEPS) if p.exists()}
    (bench.out / "gpu.json").write_text(json.dumps(everything, indent=2))
    print(f"all of it: {bench.out / 'gpu.json'}")


if __name__ == "__main__":
    main()
