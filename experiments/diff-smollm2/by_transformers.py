"""Make the two runs without an engine: rows by transformers, written by the package's own recorder.

    python experiments/diff-smollm2/by_transformers.py tone runs/diff-tone          # from the head of a checkout
    python experiments/diff-smollm2/by_transformers.py code-prose runs/diff-code-prose

A stand-in for the two harvests, whose token ids, labels and families it has: float32, the first 11 layers, one text at
a time. The numbers of RESULT.md are of these rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sglang_probe.harvest.model import resolve_model
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.workload.build import build_requests
from sglang_probe.workload.jsonl import Jsonl
from tests.rows_run import Text, write_run

LAYER = 10


def main(name: str, folder: Path) -> None:
    """Write the run of one of the two files."""
    model = resolve_model("smollm2-135m")
    workload = Jsonl(source="jsonl", path=Path(__file__).with_name(f"{name}.jsonl"))
    sampling = {"max_new_tokens": 1, "temperature": 0.0}
    found = build_requests(workload, model.tokenizer, context_length=8192, default_sampling=sampling)
    requests = {f"r{i:06}": r for i, r in enumerate(found.requests)}
    config = AutoConfig.from_pretrained(model.path)
    config.num_hidden_layers = LAYER + 1
    net = AutoModelForCausalLM.from_pretrained(model.path, config=config, dtype=torch.float32).eval()
    rows: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for rid, request in requests.items():
            kept: list[torch.Tensor] = []
            hook = net.model.layers[LAYER].register_forward_hook(
                lambda module, given, made, kept=kept: kept.append(made[0] if isinstance(made, tuple) else made)
            )
            net.model(torch.tensor([list(request.prompt_ids)]))
            hook.remove()
            rows[rid] = kept[0].reshape(-1, config.hidden_size).clone()
    texts = {rid: Text(list(r.prompt_ids), family=r.family) for rid, r in requests.items()}
    write_run(folder, texts, {f"blocks.{LAYER}.hook_resid_post": rows}, model=Path(model.path))
    table = pq.read_table(folder / REQUESTS_FILE)
    records = table.to_pylist()
    for record in records:
        labels = requests[record["rid"]].labels
        record["labels"] = [{"axis": s.axis, "name": s.name, "start": s.start, "end": s.end} for s in labels]
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), folder / REQUESTS_FILE)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
