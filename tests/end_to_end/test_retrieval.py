"""`probe-recall` in SGLang: it answers, its later questions are forced, and a run knows the right answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sglang_probe.run.run import load_run

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_recall_is_answered_by_the_model_under_questions_that_are_forced(cli: Callable, tmp_path: Path) -> None:
    config = tmp_path / "recall.yaml"
    workload = {"source": "retrieval", "task": "recall", "count": 12, "answers": 6, "depth": [0.1, 0.9]}
    config.write_text(yaml.safe_dump({"model": "probe-recall", "workload": workload, "output": str(tmp_path)}))
    done = cli("harvest", config)
    assert done.returncode == 0, done.stdout + done.stderr
    requests = load_run(tmp_path / "recall").requests()
    assert len(requests) == 12
    right = asked = 0
    for r in requests.itertuples():
        assert (r.task, r.prompt_len, r.context_len) == ("recall", 228, 226)
        assert r.depth == pytest.approx([0.1, 0.9][r.index % 2], abs=0.01)
        output = r.output_ids.tolist()
        steps = r.answer_steps.tolist()
        forced = [i for i in range(11) if i not in steps]
        assert [output[i] for i in forced] == [r.continuation_ids[i] for i in forced]
        right += sum(output[i] == answer for i, answer in zip(steps, r.answer_ids, strict=True))
        asked += len(steps)
        assert [r.prompt_ids[positions[1]] for positions in r.needed_content] == r.answer_ids.tolist()
        assert len(r.needed_causal) == 6
    assert asked == 72
    assert right >= 70
