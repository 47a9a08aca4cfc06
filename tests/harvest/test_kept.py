"""Kept sets that requests cannot have are refused before anything is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest.kept import check_backend, check_kept, keep_with_run
from sglang_probe.harvest.model import Model, resolve_model
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.workload.request import Request, SegmentSpan


@pytest.fixture
def model() -> Model:
    return resolve_model("probe-text")


@pytest.fixture
def kept(tmp_path: Path) -> KeptFile:
    sets = {
        "fits": torch.ones(1, 4, 4, 20),
        "long": torch.ones(1, 4, 4, 21),
        "heads": torch.ones(1, 4, 2, 9),
        "layers": torch.ones(1, 5, 4, 9),
    }
    write_kept(tmp_path / "kept", {k: Kept(v.bool()) for k, v in sets.items()})
    return KeptFile(tmp_path / "kept")


def _request(**probe: Any) -> Request:
    return Request(0, "r", tuple(range(20)), (SegmentSpan("p", 0, 20),), None, {"custom_params": {"probe": probe}})


def test_a_set_that_fits_and_a_request_without_one_pass(kept: KeptFile, model: Model) -> None:
    plain = replace(_request(), sampling_params={})
    check_kept([_request(evict="fits"), _request(cache="off"), plain], kept, model)
    check_kept([plain], None, model)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("long", "is for 21 positions and the prompt has 20"),
        ("heads", "4 layers of 2 kv heads; the model has 4 of 4"),
        ("layers", "5 layers of 4 kv heads; the model has 4 of 4"),
        ("absent", "`evict: absent` is not in"),
        (["fits"], "`evict`: Input should be a valid string"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(kept: KeptFile, model: Model, key: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_kept([_request(evict=key)], kept, model)


def test_a_key_without_a_file_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="the recording has no kept sets"):
        check_kept([_request(evict="fits")], None, model)


@pytest.mark.parametrize("server", [{"attention_backend": "torch_native"}, {"tp_size": 2}])
def test_an_engine_that_cannot_attend_to_kept_sets_is_refused(server: dict[str, Any]) -> None:
    check_backend({"attention_backend": "probe_torch", "tp_size": 1})
    with pytest.raises(UnsupportedError):
        check_backend(server)


def test_the_run_keeps_the_sets_that_are_named_and_no_others(kept: KeptFile, tmp_path: Path) -> None:
    said = keep_with_run(tmp_path, kept, [_request(evict="fits"), _request(evict="fits"), _request()])
    assert said["sets"] == 1
    assert list(KeptFile(tmp_path / said["file"])) == ["fits"]
