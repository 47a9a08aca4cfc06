"""A real server is asked for labels as any OpenAI-compatible endpoint is; who answered is known by its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.studies.endpoint import KEY_VARIABLE, Endpoint
from sglang_probe.studies.features.asked import Asking
from sglang_probe.studies.features.study import study
from tests.end_to_end.live_server import KEY, MODEL, LiveServer
from tests.studies.features.planted import planted_run, planted_sae

LATENTS = [0, 3, 5]


def test_our_own_server_labels_features_and_is_known_by_its_weights(
    chunked_server: LiveServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, sae, file = planted_run(tmp_path / "run").path, planted_sae(tmp_path / "sae"), tmp_path / "answers.jsonl"
    url = f"{chunked_server.url}/v1"
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="answers 401") as refused:
        Endpoint(url, None, file)
    assert KEY_VARIABLE in str(refused.value.fix)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    # The model writes nonsense. Held to a form it is a label and verdicts that can be read.
    first = Endpoint(url, None, file)
    assert first.served.weights_sha256 == weight_hash_of_folder(MODEL)
    result = study(run, sae, asking=Asking(first, latents=LATENTS, nulls=2, windows=5, grammar=True))
    assert result.asked is not None
    assert result.asked["label"].notna().all()
    assert (result.asked["answered"] == result.asked["questions"]).all()
    assert result.asked[["detection", "fuzzing"]].notna().all(axis=None)
    told = result.to_json()["labels_asked"]
    assert (told["model"], told["weights_sha256"]) == ("probe-text", first.served.weights_sha256)
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(kept) == first.asked
    assert KEY not in file.read_text()
    # The same labels from the file, judged by the words that they name: nonsense is at chance.
    again = Endpoint(url, None, file)
    words = study(run, sae, asking=Asking(again, latents=LATENTS, nulls=2, judge="words", grammar=True))
    assert again.asked == 0
    assert words.asked is not None
    assert words.asked["label"].tolist() == result.asked["label"].tolist()
    assert words.asked["detection"].mean() == pytest.approx(0.5, abs=0.15)
