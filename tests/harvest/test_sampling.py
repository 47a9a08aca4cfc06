"""Sampling values that SGLang would refuse are refused before an engine starts, by SGLang's own checks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.config import load_config
from sglang_probe.errors import ConfigError, ProbeError, UnsupportedError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.model import resolve_model
from sglang_probe.harvest.prepare import prepare
from sglang_probe.harvest.sampling import SamplingCheck

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.fixture(scope="module")
def check() -> SamplingCheck:
    return SamplingCheck(resolve_model("probe-text"), {})


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0, "max_new_tokens": 4, "stop": "x", "stop_token_ids": [1], "logit_bias": {"5": 1}},
        {"stop": ["a", "b"], "top_k": -1, "sampling_seed": 3, "n": 1, "max_new_tokens": None},
        {"regex": "a+(b|c)"},
        {"json_schema": json.dumps(SCHEMA)},
        {"ebnf": 'root ::= "a"'},
        {"stop_regex": "a|b"},
        {"custom_params": {"probe": {"cache": "off"}, "mine": [1]}},
    ],
)
def test_what_sglang_takes_passes(check: SamplingCheck, params: dict[str, Any]) -> None:
    check(params)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"temperature": "1e-3"}, "`temperature: '1e-3'`: Expected `float`, got `str`"),
        ({"temperature": -1}, "temperature must be a non-negative finite number"),
        ({"temperature": float("nan")}, "temperature must be a non-negative finite number"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k must be -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens must be in"),
        ({"max_new_tokens": 1000.0}, "`max_new_tokens: 1000.0`: Expected `int"),
        ({"max_new_tokens": True}, "`max_new_tokens: True`"),
        ({"stop": 7}, "`stop: 7`: Expected `str | array"),
        ({"stop_token_ids": [1, "a"]}, "`stop_token_ids"),
        ({"logit_bias": {"99999": 1.0}}, "logit_bias must has keys in"),
        ({"regex": "(unclosed"}, r"`regex: \(unclosed`: "),
        ({"stop_regex": "(unclosed"}, "unterminated subpattern"),
        ({"json_schema": SCHEMA}, "SGLang takes JSON as text"),
        ({"json_schema": '{"type": "objec'}, "`json_schema: "),
        ({"json_schema": '{"type": "nonsense"}'}, "nonsense"),
        ({"ebnf": 'root ::= "a'}, "`ebnf: "),
        ({"regex": "a", "json_schema": "{}"}, "Only one of json_schema, regex"),
        ({"seed": 1}, "`seed` is unknown to SGLang; did you mean `sampling_seed`"),
        ({"max_tokens": 1}, "did you mean `max_new_tokens`"),
        ({"do_sample": True}, r"set `temperature: 0\.0`"),
        ({"temprature": 1}, "did you mean `temperature`"),
    ],
)
def test_what_sglang_refuses_is_refused_by_name(check: SamplingCheck, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("|", r"\|")):
        check(params)


def test_several_outputs_are_refused(check: SamplingCheck) -> None:
    with pytest.raises(UnsupportedError, match="several outputs"):
        check({"n": 2})


def test_a_grammar_needs_a_backend() -> None:
    model = resolve_model("probe-text")
    with pytest.raises(ConfigError, match="the server argument says `none`"):
        SamplingCheck(model, {"grammar_backend": "none"})({"regex": "a"})
    with pytest.raises(ConfigError, match=r"unterminated subpattern|missing"):
        SamplingCheck(model, {"grammar_backend": "outlines"})({"regex": "(a"})


@pytest.fixture
def harvest(tmp_path: Path) -> Callable[..., HarvestConfig]:
    def make(*lines: Any, sampling: str = "{max_new_tokens: 4}", workload: str = "") -> HarvestConfig:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data/lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        path = tmp_path / "a.yaml"
        path.write_text(
            f"workload: {{source: jsonl, path: data/lines.jsonl{workload}}}\nsampling: {sampling}\nhook_points: []\n"
        )
        return load_config(path, HarvestConfig)

    return make


def test_numbers_of_yaml_are_numbers_for_sglang(harvest: Callable[..., HarvestConfig]) -> None:
    (request,) = prepare(harvest({"prompt": "a"}, sampling="{max_new_tokens: 4, temperature: 1e-3}")).workload.requests
    assert request.sampling_params == {"max_new_tokens": 4, "temperature": 1e-3}


def test_a_default_that_is_wrong_is_the_yamls_fault(harvest: Callable[..., HarvestConfig]) -> None:
    with pytest.raises(ConfigError, match=r"^`sampling`: SGLang refuses the sampling values: top_p"):
        prepare(harvest({"prompt": "a"}, sampling="{top_p: 1.5}", workload=", skip_bad: true"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "a", "sampling_params": {"top_p": 1.5}}, "sampling value"),
        ({"prompt": "a", "sampling_params": {"stop": 7}}, "sampling value"),
        ({"prompt": "a", "sampling_params": {"tempreature": 1}}, "sampling value"),
        ({"prompt": "a", "sampling_params": {"n": 2}}, "sampling value"),
        ({"prompt": "a", "sampling_params": {"custom_params": {"probe": {"cache": "of"}}}}, "ask"),
        ({"prompt": "a", "sampling_params": {"custom_params": {"probe": {"evict": "k"}}}}, "kept set"),
        ({"prompt_ids": [1, 999999]}, "token ids"),
        ({"prompt_ids": [-1]}, "token ids"),
    ],
)
def test_a_record_with_such_a_value_is_named_or_passed_over(
    harvest: Callable[..., HarvestConfig], line: Any, reason: str
) -> None:
    good = {"prompt": "a"}
    with pytest.raises(ProbeError, match=r"data/lines\.jsonl:2: "):
        prepare(harvest(good, line, good))
    found = prepare(harvest(good, line, good, workload=", skip_bad: true")).workload
    assert (len(found.requests), found.reasons) == (2, {reason: 1})
