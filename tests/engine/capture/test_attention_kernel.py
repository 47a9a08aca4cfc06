"""The Triton kernel against `study.attention` and `study.telemetry`: in Triton's interpreter, and through its compiler.

Neither needs a GPU; running the compiled kernel does, and has not been done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.capture.attention_summary import AttentionSummary
from tests.engine.capture.kernel_cases import CASES

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results() -> dict[tuple[str, str], dict[str, Any]]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.engine.capture.kernel_cases"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {(r["by"], r["name"]): r for r in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("by", ["kernel", "reference"])
@pytest.mark.parametrize("name", [c.name for c in CASES])
def test_the_kernel_agrees_with_the_reference(
    results: dict[tuple[str, str], dict[str, Any]], name: str, by: str
) -> None:
    """And so does its counterpart in PyTorch, which takes its place in an engine on a CPU."""
    found = results[by, name]
    assert found["same_positions"]
    for quantity in ("mass", "entropy", "without_sinks", "weights", "first"):
        assert found[quantity] < 1e-5, quantity


def test_a_summary_is_not_trivial() -> None:
    """Negative control of the agreement above: another region's number would be seen."""
    import torch

    lse, mean = torch.tensor([[[0.0, 1.0, -torch.inf]]]), torch.tensor([[[-0.5, 0.3, 0.0]]])
    summary = AttentionSummary(lse, mean, torch.zeros(1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1))
    assert summary.mass()[0, 0].tolist() == pytest.approx([0.26894, 0.73106, 0.0], abs=1e-5)
    assert summary.entropy(without=[1, 2]).item() == pytest.approx(0.5)
    assert summary.entropy(without=[0, 1]).item() == 0.0


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_for_a_gpu(arch: int) -> None:
    """In a process of its own: the interpreter and the compiler exclude each other."""
    code = f"""
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sglang_probe.engine.capture.attention_kernel import _summarise as kernel
constants = dict(DIM=80, BLOCK_D=128, REGIONS=5, BLOCK_R=8, TOP=8, BLOCK=64, SOFTCAP=True, FIRST=True)
pointers = dict(q="*bf16", keys="*bf16", slots="*i32", lengths="*i64", region_ends="*i64", heads="*i64")
pointers |= dict(out_lse="*fp32", out_mean="*fp32", out_positions="*i32", out_logits="*fp32")
pointers |= dict(first_keys="*i64", out_first="*fp32")
scalars = dict(scaling="fp32", softcap="fp32")
types = {{**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}}
signature = {{name: types.get(name, "i32") for name in kernel.arg_names}}
source = ASTSource(kernel, signature, {{(kernel.arg_names.index(k),): v for k, v in constants.items()}})
print(len(triton.compile(source, target=GPUTarget("cuda", {arch}, 32)).asm["cubin"]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
