#!/bin/sh
# From the head of a checkout, with the run and the dictionary of models/sae-smollm2.
#   MODEL=folder-of-SmolLM2-135M-Instruct sh experiments/labels-smollm2/label.sh OUTPUT
# Serves SmolLM2 by SGLang on 127.0.0.1, asks it for labels in three ways, and stops it. What was answered is kept: after
# an interruption it goes on from there. `sglang-probe model list` says where the model lies.
set -eu
out=$1
port=${PORT:-30011} runs=${RUNS:-runs} saes=${SAES:-saes}
mkdir -p "$out/held-words"
python -m sglang.launch_server --model-path "$MODEL" --dtype float32 --host 127.0.0.1 --port "$port" \
  --max-total-tokens 32768 --max-running-requests 8 --log-level warning > "$out/server.log" 2>&1 &
server=$!
trap 'kill $server' EXIT
trap 'exit 143' INT TERM
until curl -sf "http://127.0.0.1:$port/health" > "$out/health"; do
  kill -0 $server
  sleep 1
done

ask() {
  sglang-probe features "$runs/sae-smollm2" --sae "$saes/sae-smollm2/batchtopk-2304-seed0" --most 20000 \
    --label-with "http://127.0.0.1:$port/v1" --label-most 20 --label-nulls 10 --label-windows 5 --label-at-once 8 "$@"
}
ask --label-grammar --output "$out/held"
cp "$out/held/answers.jsonl" "$out/held-words/"
ask --label-grammar --label-judge words --output "$out/held-words"
ask --label-judge words --label-body '{"max_tokens": 120}' --output "$out/free"
