#!/bin/bash
# Makes .kit/ in the repository: what the device machine lacks to run SGLang 0.5.17 (torch 2.11, cp312), about 45 MB.
# For a GPU machine without a network, with torch 2.11, triton 3.6 and CUDA's compiler; SGLang 0.5.17 is the release of
# that torch. Run in the repository root:  bash bench/gpu_kit/prepare.sh   (needs a Python with pip; x86-64 wheels are
# asked for). Then there, in a copy of the repository with .kit:  bash bench/gpu_kit/on_device.sh 540 steer overhead8
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd); ROOT=$PWD; KIT=$ROOT/.kit; WORK=${WORK:-${TMPDIR:-/var/tmp}/kitwork}; PY=${PY:-python3}
grep -qx /.kit/ .git/info/exclude 2>/dev/null || echo /.kit/ >> .git/info/exclude
mkdir -p "$WORK/whl" "$KIT"; rm -rf "$WORK/site"; mkdir "$WORK/site"

# 1. wheels ----------------------------------------------------------------------------------------------------------
P=(); for n in 34 31 28 27 24 17 12 5; do P+=(--platform manylinux_2_${n}_x86_64); done
P+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
GET=($PY -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${P[@]}" -d "$WORK/whl")
"${GET[@]}" sglang==0.5.17 sglang-kernel==0.4.5                 # 22 MB, 383 MB (both are stripped below)
"${GET[@]}" transformers==5.12.1 tokenizers==0.22.2             # the device's 5.17.0 clashes: AutoConfig.register('qwen3_asr')
"${GET[@]}" apache-tvm-ffi==0.1.11                              # loads (and builds) SGLang's JIT kernels
"${GET[@]}" pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 \
  fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 opentelemetry-api==1.45.2 python-multipart==0.0.34 watchfiles==1.3.0 \
  msgspec==0.22.0 orjson==3.13.0 pybase64==1.5.1 pyzmq==27.3.0 setproctitle==1.3.8 partial-json-parser==0.2.1.1.post7 \
  dill==0.4.1 compressed-tensors==0.20.0 loguru==0.7.3 gguf==0.19.0 \
  openai==2.6.1 jiter==0.19.0 distro==1.9.0 sniffio==1.3.1

# 2. unpack and strip ------------------------------------------------------------------------------------------------
$PY - "$WORK" <<'PYTHON'
import re, sys, zipfile
from pathlib import Path
work = Path(sys.argv[1]); site = work / "site"
drop = {
    # not imported by an engine of text models; the three Rust extensions are optional servers and image codecs
    "sglang-": re.compile(r"^sglang/(multimodal_gen|test|benchmark|eval)/|_core\.cpython|dist-info/(RECORD|licenses)|^(?!sglang/kernels/jit/).*\.(cu|cuh|cpp|cc|h|hpp)$"),
    # of the compiled code only what `sgl_kernel/__init__.py` loads on compute capability 9.0 (flash_ops alone has 1.1 GB)
    "sglang_kernel-": re.compile(r"^(?!sgl_kernel/sm90/).*\.so$|dist-info/(RECORD|licenses)"),
}
for wheel in sorted((work / "whl").glob("*.whl")):
    rule = next((r for k, r in drop.items() if wheel.name.startswith(k)), re.compile(r"dist-info/RECORD$"))
    with zipfile.ZipFile(wheel) as z:
        for i in z.infolist():
            if not rule.search(i.filename):
                z.extract(i, site)
stubs = {
    "IPython/__init__.py": "",
    "IPython/display.py": "def display(*_a, **_k): ...\n\n\ndef HTML(*_a, **_k): ...\n",
    "zstandard/__init__.py": "",
    "xgrammar/__init__.py": "__version__ = '0.0.0+stub'\nfrom pydantic import BaseModel\n\n\nclass StructuralTag(BaseModel):\n    pass\n",
    "xgrammar/structural_tag.py": "def __getattr__(n):\n    if n.startswith('__'):\n        raise AttributeError(n)\n    return type(n, (), {})\n",
    "flashinfer/__init__.py": "__version__ = '0.0.0+stub'\n\n\ndef missing(n):\n    def call(*_a, **_k):\n        raise RuntimeError(f'{n} is a stub of this kit')\n\n    return call\n\n\nbmm_fp8 = missing('flashinfer.bmm_fp8')\n",
}
for m in ("sampling", "prefill"):
    stubs[f"flashinfer/{m}.py"] = f"from flashinfer import missing\n\n\ndef __getattr__(n):\n    if n.startswith('__'):\n        raise AttributeError(n)\n    return missing('flashinfer.{m}.' + n)\n"
for name, text in stubs.items():
    (site / name).parent.mkdir(exist_ok=True)
    (site / name).write_text(text)
# SGLang finds the plugin by its entry points; the package itself is the working tree, on PYTHONPATH
info = site / "sglang_probe-0.1.0.dist-info"; info.mkdir()
(info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-probe\nVersion: 0.1.0\n")
(info / "entry_points.txt").write_text(
    "[sglang.srt.plugins]\nsglang_probe = sglang_probe.plugin:register\n\n"
    "[sglang.srt.platforms]\nsglang_probe_cpu = sglang_probe.plugin:activate_cpu_platform\n")
PYTHON

# 3. the kit ---------------------------------------------------------------------------------------------------------
# JIT kernels built beforehand, if they are there (jit_build.py with FAKE_SM90=1 and an nvcc 13, see the report)
rm -rf "$KIT/jit"; [ -d "${JIT:-$HERE/jit}" ] && cp -r "${JIT:-$HERE/jit}" "$KIT/jit" || true
tar -C "$WORK/site" -cf - . | xz -T0 -6 > "$KIT/site.tar.xz"
mkdir -p "$KIT/plug/kit_timing-0.dist-info"; cp "$HERE/timing.py" "$KIT/plug/kit_timing.py"
printf 'Metadata-Version: 2.1\nName: kit-timing\nVersion: 0\n' > "$KIT/plug/kit_timing-0.dist-info/METADATA"
printf '[sglang.srt.plugins]\nkit_timing = kit_timing:register\n' > "$KIT/plug/kit_timing-0.dist-info/entry_points.txt"
du -sm "$KIT"; du -sm --exclude=.git --exclude=.kit --exclude='.venv*' --exclude=runs --exclude=.cache .
