"""The decay study end to end: what it says of each steered step is what `transformers` computes."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from rich.console import Console

from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.paths import shipped
from sglang_probe.run.run import load_run
from sglang_probe.sae.folder import read_sae
from sglang_probe.steering.library import Library
from sglang_probe.studies.steer_decay.command import SteerDecay
from sglang_probe.studies.steer_decay.names import PLAIN, named
from sglang_probe.studies.steer_decay.target import lens_tokens, log_odds
from tests.declared import run_commands
from tests.end_to_end.steering import MODEL, Reference, make_library

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.reviewed("steering")]
PROMPT, ONSETS, WINDOW, AFTER, STRENGTH = 24, [1, 6], 3, 4, 40.0
FEATURES = list(range(0, 1024, 4))


@contextmanager
def answering(text: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that gives one answer to everything: its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "stub"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._send({"choices": [{"message": {"content": text}}]})

        def _send(self, told: dict[str, Any]) -> None:
            body = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def test_each_step_is_what_transformers_computes(cli: Callable, tmp_path: Path) -> None:
    make_library(tmp_path / "vectors")
    fields = {
        "dtype": "float32",
        "workload": {"source": "documents", "count": 6, "chars": 500},
        "steer": {"library": "vectors"},
        "vector": "up",
        "random": ["feature"],
        "strength": STRENGTH,
        "unit": "absolute",
        "onsets": ONSETS,
        "window": WINDOW,
        "after": AFTER,
        "prompt_tokens": PROMPT,
        "lens": 5,
        "downstream": {"sae": str(shipped("models/sae-probe-text/seed-0")), "features": FEATURES},
        "probe": "fires",
        "concept": "ships",
    }
    config, folder = tmp_path / "decay.yaml", tmp_path / "study"
    config.write_text(yaml.safe_dump(fields))
    done = cli("steer", "decay", config, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((folder / "summary.json").read_text())
    assert told["ok"]
    assert told["families"] == 6
    assert "Steering decay: up" in (folder / "report.html").read_text()
    # Nothing is steered before an onset, and a dose of zero is none.
    effects = pd.DataFrame(told["effects"])
    floor = effects[effects["arm"] == "zero dose"]["kl"].abs().max()
    assert floor < 1e-6
    assert told["largest_kl_before_onsets"] < 1e-6
    vector = effects[effects["arm"] == "vector"]
    assert len(vector) == 2 * len(ONSETS)
    assert vector["kl"].min() > 1000 * floor
    assert vector["shift"].min() > 0

    steps = pd.read_parquet(folder / "tables" / "steps.parquet")
    library = Library.open(tmp_path / "vectors")
    reference, unembedding = Reference(library), load_unembedding(MODEL)
    positive, negative = lens_tokens(library["up"].vector, unembedding, 5)
    run = load_run(folder / "forced")
    requests = run.requests()
    asked = requests[requests["rid"].map(lambda rid: named(rid)[1:] == ("own", "up", 6))].iloc[0]
    ids = [*asked["prompt_ids"].tolist(), *asked["output_ids"].tolist()]
    window = {"generation_window": [6, 6 + WINDOW], "phases": ["decode"]}
    logp = [
        torch.log_softmax(unembedding.logits(reference.rows(ids, PROMPT, steer)[-1]), -1)
        for steer in ([], [{"vector": "up", "strength": STRENGTH, **window}])
    ]
    # Step s is the row of position PROMPT + s - 1.
    at = [PROMPT + 6 - 1 + offset for offset in range(WINDOW + AFTER)]
    plain, steered = (x[at] for x in logp)
    kl = (plain.exp() * (plain - steered)).sum(-1).numpy()
    shift = (log_odds(steered, positive, negative) - log_odds(plain, positive, negative)).numpy()
    mine = steps[(steps["text"] == named(asked["rid"])[0]) & (steps["source"] == "own text")]
    mine = mine[(mine["vector"] == "up") & (mine["onset"] == 6)].sort_values("offset")
    assert mine["offset"].tolist() == list(range(WINDOW + AFTER))
    assert np.allclose(mine["kl"], kl, rtol=1e-3, atol=1e-5)
    assert np.allclose(mine["shift"], shift, rtol=1e-3, atol=1e-4)
    assert kl[WINDOW:].max() > 1e-4  # what is left after the dose, through the cache

    # Features of layer 2, under a dose after layer 1: over all texts.
    sae = read_sae(shipped("models/sae-probe-text/seed-0"))
    rises = []
    for r in requests[requests["rid"].map(lambda rid: named(rid)[1:] == ("own", "up", 6))].itertuples():
        ids = [*r.prompt_ids.tolist(), *r.output_ids.tolist()]
        z = [
            sae.encode(reference.rows(ids, PROMPT, steer)[2][at[:WINDOW]])[:, FEATURES].sum(1)
            for steer in ([], [{"vector": "up", "strength": STRENGTH, **window}])
        ]
        rises.append(float((z[1] - z[0]).mean()))
    later = pd.DataFrame(told["downstream"]).set_index(["source", "arm", "onset"])
    assert later.loc[("own text", "vector", 6), "activation"] == pytest.approx(np.mean(rises), rel=1e-3)
    assert abs(np.mean(rises)) > 0.1
    assert later.loc[("own text", "zero dose", 6), "activation"] == pytest.approx(0, abs=1e-3)

    # The probe reads what was written, as a plain prompt.
    wrote = {named(r.rid): [*r.prompt_ids, *r.output_ids] for r in load_run(folder / "free").requests().itertuples()}
    cut = slice(PROMPT + 6, PROMPT + 6 + WINDOW)
    w = library["fires"].vector
    scores = {
        arm: [reference.rows(ids, PROMPT, [])[2][cut] @ w for k, ids in wrote.items() if k[2:] == arm]
        for arm in (("up", 6), (PLAIN, 0))
    }
    over = [torch.stack(scores[arm]).mean(1).mean() for arm in (("up", 6), (PLAIN, 0))]
    said = pd.DataFrame(told["probe"]).set_index(["arm", "onset"]).loc[("vector", 6)]
    assert said["score"] == pytest.approx(float(over[0] - over[1]), rel=1e-3, abs=1e-3)
    assert said["plain"] == pytest.approx(float((torch.stack(scores[(PLAIN, 0)]) > 0).float().mean()))

    # Through the text alone: the steps after the window, read without steering.
    after = slice(PROMPT + 6 + WINDOW - 1, PROMPT + 6 + WINDOW - 1 + AFTER)
    levels = {}
    for name in (("up", 6), (PLAIN, 0)):
        rows = [reference.rows(ids, PROMPT, [])[-1][after] for k, ids in wrote.items() if k[2:] == name]
        odds = [log_odds(torch.log_softmax(unembedding.logits(x), -1), positive, negative).mean() for x in rows]
        levels[name] = float(torch.stack(odds).mean())
    through = pd.DataFrame(told["text"]).set_index(["arm", "onset"]).loc[("vector", 6)]
    assert through["plain"] == pytest.approx(levels[(PLAIN, 0)], rel=1e-3, abs=1e-3)
    assert through["shift"] == pytest.approx(levels[("up", 6)] - levels[(PLAIN, 0)], rel=1e-3, abs=2e-3)

    human = requests[requests["rid"].map(lambda rid: named(rid)[1] == "human")].iloc[0]
    own = requests[requests["rid"].map(lambda rid: named(rid)[0] == named(human["rid"])[0])]
    assert len({tuple(r["output_ids"][:5]) for _, r in own.iterrows()}) == 2

    with answering("1") as (address, asked_of_judge):
        given = dict.fromkeys(("overwrite", "resume", "plan", "skip_bad"), False) | {"judge": address}
        given |= {"experiment": config, "output": folder, "report_only": True, "judge_model": None}
        found: Any = SteerDecay().obtain(given, Console(file=io.StringIO()))
    assert found[0].judge["model"] == "stub"
    assert (found[0].judged["plain_concept"] == 1).all()
    assert (found[0].judged["score"] == 0).all()
    # Two questions for every text of an arm, and for the plain model's text in the same window.
    assert len(asked_of_judge) == len({q["messages"][0]["content"] for q in asked_of_judge})
    about = [q["messages"][0]["content"] for q in asked_of_judge]  # in the order in which the judge's workers came
    assert 2 * sum("ships" in q for q in about) == len(about)

    read = ["steer", "decay", str(config), "--output", str(folder), "--report-only"]
    assert list(run_commands([read]).values()) == [0]
    again = cli("steer", "decay", config, "--output", folder, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting SGLang" not in again.stdout
