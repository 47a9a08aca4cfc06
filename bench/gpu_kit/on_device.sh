#!/bin/bash
# On the GPU machine, in the repository root, after prepare.sh:  bash bench/gpu_kit/on_device.sh SECONDS [STEPS...]
#   micro     taps in CUDA graphs without SGLang                                   15 s
#   prove     the certificate that telemetry and replay need, decode graphs (P1)  100 s
#   prefill   the same with prefill graphs: P1 of each, replayed in the traffic   100 s
#   telemetry beside captured rows, and where the two differ                       60 s
#   steer8    a step with interventions on a shape of 8 B, by PyTorch and fused   170 s
#   steer     interventions in graphs: right, and what they cost, both ways       220 s
#   replay    rows with graphs and without, beside the floors                     165 s
#   overhead8 stock, ledger and rows on that shape                                120 s
#   timing    1.2 B: stock and rows, and where the time goes                      100 s
# Without STEPS the first five, which is what no GPU has run yet. The first call unpacks and makes the model (35 s); a
# later one on the same machine goes on with them. Every step is time-boxed and writes its result into $OUT at once. What
# came of it: docs/evidence/gpu-results.md.
# REHEARSE=1 runs the steps that a CPU can, in the present environment with a tiny model: it measures nothing.
set -u
LIMIT=${1:-560}; shift; STEPS=${*:-micro prove prefill telemetry steer8}; REHEARSE=${REHEARSE:-}; PY=${PY:-python3}
END=$((SECONDS + LIMIT)); T=${TMPDIR:-/var/tmp}; OUT=${OUT:-$T/out}; KIT=$PWD/.kit; HERE=$PWD/bench/gpu_kit; W=$T/kitrun
mkdir -p "$OUT" $W; LOG=$OUT/log.txt; RES=$OUT/results.jsonl; : > "$LOG"; : > "$RES"
left() { echo $((END - SECONDS)); }
say() { echo "[$((LIMIT - END + SECONDS)) s] $*" | tee -a "$LOG"; }
note() { printf '{"step": "%s", "at_s": %d, "result": %s}\n' "$1" $((LIMIT - END + SECONDS)) "$2" >> "$RES"; }
file() { [ -s "$2" ] && note "$1" "$(tr '\n' ' ' < "$2")"; }
wants() { [[ " $STEPS " == *" $1 "* ]]; }
step() {
  local name=$1 most=$2 rc; shift 2; local l; l=$(left); [ "$l" -lt 20 ] && { note "$name" '"no time left"'; return 9; }
  [ "$most" -gt "$l" ] && most=$l
  say "$name (at most $most s)"; timeout -k 5 "$most" "$@" > "$W/$name.log" 2>&1; rc=$?
  { echo "--- $name rc=$rc"; tail -c 12000 "$W/$name.log"; } >> "$LOG"; say "$name: rc $rc"
  [ $rc -ne 0 ] && { echo "--- $name, its end"; tail -c 2000 "$W/$name.log"; }
  return $rc
}
run_of() { dirname "$(ls -t "$1"/manifest.json "$1"/*/manifest.json 2>/dev/null | head -1)" 2>/dev/null; }

SITE=$T/site; FRESH=0; MODEL=$T/bench/model; MODEL8=$T/bench8/model
if [ -n "$REHEARSE" ]; then
  export PYTHONPATH=$PWD SGLANG_PROBE_DEVICE=cpu SGLANG_PROBE_CACHE=$T/probe-cache
  SERVER='{}'; with() { echo '{}'; }; FEW="--requests 8 --rounds 1 --transformers 1"; SIMULATED="simulated_graphs: true"
  MODEL8=$MODEL; $PY bench/gpu.py --out $T/bench --rehearse --steps model > $W/model.log 2>&1; say "a rehearsal, which measures nothing"
else
FEW=; SIMULATED=
[ -d $SITE/sglang ] || { FRESH=1; mkdir -p $SITE; tar -C $SITE -xJf "$KIT/site.tar.xz"; }
export SITE PYTHONPATH=$SITE:$PWD PYTHONUNBUFFERED=1 PYTHONPYCACHEPREFIX= TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE
export SGLANG_IS_FLASHINFER_AVAILABLE=false SGLANG_HOST_IP=127.0.0.1 HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo
export TRITON_CACHE_DIR=$T/triton TVM_FFI_CACHE_DIR=$T/jit OMP_NUM_THREADS=4 SGLANG_PROBE_CACHE=$T/probe-cache
export CUDA_HOME=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")")}
[ -d $CUDA_HOME/include ] || [ ! -d /usr/local/cuda ] || export CUDA_HOME=/usr/local/cuda
SERVER='{"attention_backend":"triton","sampling_backend":"pytorch","grammar_backend":"none","disable_prefill_cuda_graph":true,"cuda_graph_bs_decode":[1,2,4,8,16,24,32,48,64],"mem_fraction_static":0.5,"skip_server_warmup":true}'
with() { python3 -c 'import json,sys;s=json.loads(sys.argv[1]);s.update(json.loads(sys.argv[2]));print(json.dumps({k:v for k,v in s.items() if v is not None}))' "$SERVER" "$1"; }
fi
if [ $FRESH = 1 ]; then
  mkdir -p $T/jit; [ -d "$KIT/jit" ] && cp -r "$KIT/jit/." $T/jit/
  say "unpacked"
  PKGS=$(python3 -c 'import torch,os;print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null)
  (timeout 100 python3 -m compileall -q -j 8 $SITE sglang_probe bench > $W/compile.log 2>&1
   cd "$PKGS" && timeout 60 python3 -m compileall -q -j 8 torch triton numpy pandas pyarrow scipy aiohttp huggingface_hub jinja2 >> $W/compile.log 2>&1; say "bytecode is compiled") &
  B=$!
  (OMP_NUM_THREADS=8 timeout 150 python3 bench/gpu.py --out $T/bench --steps model > $W/model.log 2>&1; say "model: made"; { echo "--- model"; tail -c 2000 $W/model.log; } >> "$LOG") &
  K=$!
  for d in "64 1024" "128 2048"; do for k in clamp rope kv act; do (timeout 150 python3 "$HERE/jit_build.py" $SITE $d $k >> $W/jit.log 2>&1) & done; done; wait
  note machine "\"$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -1), $(nvcc --version 2>&1 | tail -1 | tr -d '"'), $(python3 -c 'import sys,torch,triton,numpy,transformers as t;print(sys.version.split()[0],torch.__version__,torch.version.cuda,triton.__version__,numpy.__version__,t.__version__)' 2>&1 | tail -1), $(nproc) cores\""
  note jit "\"$(tail -c 600 $W/jit.log | tr '\n"\\' ';  ')\""; say "base is done"
fi

if wants micro; then
  [ -n "$REHEARSE" ] && note micro '"needs a GPU"' || { step micro 90 $PY bench/gpu_taps.py $W/micro.json; file micro $W/micro.json; }
fi
if wants prove; then
  step prove 200 $PY bench/gpu.py --out $T/bench ${REHEARSE:+--rehearse} --steps prove --server "$SERVER"
  cp $T/bench/certificate.json $OUT/ 2>/dev/null; file prove $T/bench/prove.json
fi
if wants prefill; then
  step prefill 200 $PY -m sglang_probe prove --model $MODEL $FEW --output $W/prefill.json --server "$(with '{"disable_prefill_cuda_graph":null,"cuda_graph_bs_prefill":[64,128,256,512,1024]}')"
  cp $W/prefill.json $OUT/certificate-prefill.json 2>/dev/null; file prefill $W/prefill.json
fi
if wants telemetry; then
cat > $W/telemetry.yaml <<Y
model: $MODEL
dtype: bfloat16
workload: {source: shared_prefix, families: 3, requests_per_family: 6, exemplars: 2}
hook_points: [hook_embed, "blocks.*.attn.hook_rot_q", "blocks.*.attn.hook_rot_k"]
telemetry: {every: 4}
sampling: {max_new_tokens: 48, temperature: 0.0, ignore_eos: true}
concurrency: 16
server: $SERVER
output: $W/telemetry
$SIMULATED
Y
  [ -n "$REHEARSE" ] || sed -i 's/^hook_points.*/hook_points: [hook_embed, blocks.7.attn.hook_rot_q, blocks.7.attn.hook_rot_k, blocks.15.attn.hook_rot_q, blocks.15.attn.hook_rot_k]/; s/^telemetry.*/telemetry: {layers: [7, 15], every: 4}/' $W/telemetry.yaml
  step telemetry 120 $PY -m sglang_probe harvest $W/telemetry.yaml --overwrite
  R=$(run_of $W/telemetry); [ -n "$R" ] && { step telemetry-compare 90 $PY "$HERE/telemetry.py" "$R" $W/telemetry.json; step telemetry-verify 60 $PY -m sglang_probe verify "$R"; }
  note telemetry "\"$(cat $W/telemetry-verify.log 2>/dev/null | tail -c 2500 | tr '\n"\\' ';  ')\""; file telemetry-compare $W/telemetry.json
fi
if wants steer8; then
  [ -n "$REHEARSE" ] || [ -f $MODEL8/config.json ] || $PY bench/gpu.py --out $T/bench8 --shape 8b --steps model > /dev/null 2>&1
  [ -n "$REHEARSE" ] || $PY -c "import torch,sys;from safetensors.torch import save_file;save_file({'none':torch.zeros(1)},sys.argv[1]+'/model.safetensors')" $MODEL8
  for how in fused ""; do
    step steer8-${how:-plain} 95 $PY bench/gpu_steering.py $W/steer8-${how:-plain}.json --model $MODEL8 --rounds ${REHEARSE:-5} --steps cost ${how:+--fused} --server "$(with '{"mem_fraction_static":0.7,"load_format":"dummy"}')"
    cp $W/steer8-${how:-plain}.json $OUT/ 2>/dev/null; file steer8-${how:-plain} $W/steer8-${how:-plain}.json
  done
fi
if wants steer; then
  for how in fused ""; do
    step steer-${how:-plain} 170 $PY bench/gpu_steering.py $W/steer-${how:-plain}.json --model $MODEL --rounds ${REHEARSE:-3} ${how:+--fused} --server "$SERVER"
    cp $W/steer-${how:-plain}.json $OUT/ 2>/dev/null; file steer-${how:-plain} $W/steer-${how:-plain}.json
  done
fi
if wants replay; then
  step replay 240 $PY bench/gpu.py --out $T/bench ${REHEARSE:+--rehearse} --steps replay --requests 40 --server "$SERVER"
  cp $T/bench/replay.json "$OUT/" 2>/dev/null; file replay $T/bench/replay.json
fi
if wants overhead8; then
  step overhead8 215 $PY bench/gpu.py --out $T/bench8 $([ -n "$REHEARSE" ] && echo --rehearse || echo --shape 8b) --steps overhead --rounds 1 --modes stock ledger "residuals of 4 layers" --server "$(with '{"mem_fraction_static":0.7}')"
  cp $T/bench8/overhead.json $OUT/overhead8.json 2>/dev/null; file overhead8 $T/bench8/overhead.json
  [ -s $T/bench8/overhead.json ] || file overhead8-so-far $T/bench8/overhead-rounds.json
fi
if wants timing; then
  H='"blocks.3.hook_resid_post","blocks.7.hook_resid_post","blocks.11.hook_resid_post","blocks.15.hook_resid_post"'
  for how in stock rows timed; do
    [ $how = stock ] && TASK='"mode":"stock","hook_points":null' || TASK="\"mode\":\"rows\",\"hook_points\":[$H]"
    [ $how = timed ] && export PYTHONPATH=$PYTHONPATH:$KIT/plug KIT_TIMING=$W/timing
    step timing-$how 50 $PY bench/gpu.py --measure "{$TASK,\"model\":\"$MODEL\",\"rehearse\":$([ -n "$REHEARSE" ] && echo true || echo false),\"server\":$SERVER}"
    grep RESULT $W/timing-$how.log; note timing-$how "$(grep RESULT $W/timing-$how.log | cut -c8- || echo null)"
  done
  cat $W/timing.[0-9]* > $OUT/timing.json 2>/dev/null
fi
say done; cut -c1-2500 "$RES"
