"""Bad input: one clear sentence, the right exit code, nothing half-written. No engine is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sglang_probe.paths import shipped


@pytest.fixture
def refuse(cli: Callable, write_yaml: Callable, tmp_path: Path) -> Callable[..., str]:
    """Run a harvest that must be refused before anything is written; returns what it says."""

    def run(*options: str, **fields: object) -> str:
        done = cli("harvest", write_yaml("bad", **fields), "--output", tmp_path / "out", *options)
        assert done.returncode == 2, done.stdout + done.stderr
        assert not (tmp_path / "out").exists()
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


def test_an_unknown_key_is_named_with_the_nearest_known_one(refuse: Callable) -> None:
    message = refuse(hook_point=["hook_embed"])
    assert "unknown key `hook_point`" in message
    assert "did you mean `hook_points`" in message


def test_an_unknown_key_of_the_workload_is_named_too(refuse: Callable) -> None:
    assert "did you mean `families`" in refuse(workload={"familys": 3})


def test_a_model_that_is_not_there(refuse: Callable) -> None:
    assert "no model at /no/such/model" in refuse(model="/no/such/model")


def test_a_layer_the_model_does_not_have_lists_what_exists(refuse: Callable) -> None:
    message = refuse(hook_points=["blocks.4.hook_resid_post"])
    assert "the model has 4 layers" in message
    assert "blocks.3.hook_resid_post" in message


def test_an_unknown_hook_point(refuse: Callable) -> None:
    assert "unknown hook point `blocks.0.hook_mlp`" in refuse(hook_points=["blocks.0.hook_mlp"])


def test_heads_under_tensor_parallelism(refuse: Callable) -> None:
    message = refuse(hook_points=["hook_embed", "blocks.0.attn.hook_rot_q"], server={"tp_size": 2})
    assert "`blocks.0.attn.hook_rot_q` under tensor parallelism" in message


def test_heads_and_layers_that_the_model_does_not_have(refuse: Callable) -> None:
    message = refuse(hook_points=["hook_embed", "blocks.0.attn.hook_rot_k"], rows={"kv_heads": [0, 4]})
    assert "names head 4; `blocks.0.attn.hook_rot_k` has 4" in message
    assert "names layer 4; the model has 4" in refuse(telemetry={"layers": [0, 4]})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 512},
            "window of 512 tokens",
        ),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "latent attention (MLA)"),
    ],
)
def test_attention_that_cannot_be_captured(refuse: Callable, tmp_path: Path, changed: dict, named: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(shipped("models/probe-text/checkpoint"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changed))
    assert named in refuse(model=str(model), hook_points=["hook_embed", "blocks.0.attn.hook_rot_q"])


def test_prompt_plus_output_longer_than_the_context(refuse: Callable) -> None:
    message = refuse(sampling={"max_new_tokens": 4090})
    assert "request 0" in message
    assert "4090" in message
    assert "4096" in message


def test_a_path_that_is_not_handled_is_refused_by_name(refuse: Callable) -> None:
    assert "speculative decoding" in refuse(server={"speculative_algorithm": "NGRAM"})


def test_an_argument_that_the_probe_sets_itself(refuse: Callable) -> None:
    assert "disable_radix_cache" in refuse(server={"disable_radix_cache": True})


def test_an_unknown_server_argument(refuse: Callable) -> None:
    assert "did you mean `chunked_prefill_size`" in refuse(server={"chunk_prefill_size": 64})


def test_an_unknown_sampling_parameter(refuse: Callable) -> None:
    assert "did you mean `max_new_tokens`" in refuse(sampling={"max_new_token": 8})


def test_several_outputs_of_one_request(refuse: Callable) -> None:
    assert "several outputs" in refuse(sampling={"n": 2, "max_new_tokens": 8})


def test_a_prompt_that_does_not_fit_into_the_kv_pool(refuse: Callable) -> None:
    assert "do not fit into the context of 128" in refuse(server={"max_total_tokens": 128})


def test_an_architecture_whose_rows_were_not_compared_with_a_reference(refuse: Callable, tmp_path: Path) -> None:
    import json
    import shutil

    from sglang_probe.paths import shipped

    model = tmp_path / "cohere"
    shutil.copytree(shipped("models/probe-text/checkpoint"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "model_type": "cohere", "architectures": ["CohereForCausalLM"]})
    )
    assert "rows of CohereForCausalLM" in refuse(model=str(model))


def test_overwrite_keeps_the_old_run_until_the_new_one_is_checked(
    cli: Callable, write_yaml: Callable, tmp_path: Path
) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "manifest.json").write_text("{}")
    done = cli("harvest", write_yaml("bad", server={"chunk_prefill_size": 64}), "--output", old, "--overwrite")
    assert done.returncode == 2
    assert (old / "manifest.json").read_text() == "{}"


def test_malformed_lines_can_be_skipped_only_where_lines_are_read(refuse: Callable) -> None:
    assert "reads no file" in refuse("--skip-bad")


def test_a_malformed_line_is_named_by_file_and_number(refuse: Callable, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "def f"}\n{"prompt": \n')
    path = tmp_path / "jsonl.yaml"
    path.write_text(yaml.safe_dump({"workload": {"source": "jsonl", "path": str(lines)}}))
    message = refuse_file(refuse, path)
    assert "prompts.jsonl" in message
    assert "line 2" in message or ":2" in message


def refuse_file(refuse: Callable, path: Path) -> str:
    """As `refuse`, with a YAML of one's own."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "sglang_probe", "harvest", str(path), "--output", str(path.parent / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert not (path.parent / "out").exists()
    return done.stderr


def test_a_file_that_is_not_there(cli: Callable, tmp_path: Path) -> None:
    done = cli("harvest", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_verify_of_something_else_is_refused(cli: Callable, tmp_path: Path) -> None:
    done = cli("verify", tmp_path)
    assert done.returncode == 2
    assert "not a run directory" in done.stderr


def test_doctor_finds_every_target_as_reviewed(cli: Callable) -> None:
    done = cli("doctor")
    assert done.returncode == 0
    assert "0 not as reviewed" in done.stdout
    assert "Scheduler.run_batch" in done.stdout
