"""The Triton kernel for interventions beside PyTorch's operations: in Triton's interpreter, and through its compiler.

Neither needs a GPU; running the compiled kernel does, and has not been done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.capture.steering_kernel_cases import CASES

ROOT = Path(__file__).parents[3]


def test_the_kernel_changes_what_the_operations_change() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.engine.capture.steering_kernel_cases"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["name"] for r in results] == CASES
    for r in results:
        assert r["off"] < (1e-2 if r["name"].startswith("bfloat16") else 1e-6), r
        assert r["kept"]
        assert 0.3 < r["changed"] < 0.95


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernel_compiles_for_a_gpu(arch: int) -> None:
    """In a process of its own: the interpreter and the compiler exclude each other."""
    code = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sglang_probe.engine.capture.steering_kernel import _apply as kernel
constants = dict(D=4096, BLOCK=4096, PASSES=2)
types = dict.fromkeys(constants, "constexpr") | dict(x="*bf16", to="*bf16", told="*i32", linear="*i1")
types |= dict.fromkeys(["write", "read", "offset", "threshold", "scale"], "*fp32")
signature = {{name: types.get(name, "i32") for name in kernel.arg_names}}
source = ASTSource(kernel, signature, {{(kernel.arg_names.index(k),): v for k, v in constants.items()}})
print(len(triton.compile(source, target=GPUTarget("cuda", {arch}, 32)).asm["cubin"]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
