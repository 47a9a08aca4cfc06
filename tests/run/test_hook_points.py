"""Names of hook points, and what is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.run.hook_points import (
    ATTENTION,
    attention_points,
    check_architecture,
    check_hook_points,
    check_rows_of,
    check_sliding_window,
    check_tensor_parallel,
    engine_module,
    expand,
    head_counts,
    parse_hook_point,
    parse_pattern,
)


@pytest.mark.parametrize("site", ["hook_resid_post", *ATTENTION])
def test_a_name_says_its_layer_and_site(site: str) -> None:
    point = parse_hook_point(f"blocks.12.{site}")
    assert (point.layer, point.site) == (12, site)
    assert point.in_attention == (site != "hook_resid_post")
    assert engine_module(point.name).startswith("model.layers.12")


@pytest.mark.parametrize(
    "name",
    ["blocks.0.hook_q", "blocks.0.attn.hook_z", "blocks.0.attn.hook_rot_v", "blocks.x.attn.hook_q", "attn.hook_q"],
)
def test_other_names_are_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ConfigError, match=r"hook point `blocks|unknown hook point") as error:
        parse_hook_point(name)
    assert "attn.hook_rot_k" in str(error.value)


def test_every_site_has_a_place_of_its_own_in_the_engine() -> None:
    assert len({engine_module(f"blocks.0.{site}") for site in ATTENTION}) == len(ATTENTION)


def test_a_layer_that_the_model_lacks_is_refused_at_attention_too() -> None:
    with pytest.raises(ConfigError, match="numbered 0 to 3"):
        check_hook_points(["blocks.4.attn.hook_q"], 4)


def test_heads_that_are_spread_over_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.attn\.hook_v.*tp_size: 2"):
        check_tensor_parallel(["hook_embed", "blocks.1.attn.hook_v"], 2)
    check_tensor_parallel(["hook_embed", "blocks.1.hook_resid_post"], 2)
    check_tensor_parallel(["blocks.1.attn.hook_v"], 1)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Gemma2ForCausalLM", "caps its attention logits"),
        ("Gemma3ForCausalLM", "sliding-window layers"),
        ("DeepseekV2ForCausalLM", r"latent attention \(MLA\)"),
        ("DeepseekV3ForCausalLM", r"latent attention \(MLA\)"),
        ("GptOssForCausalLM", "has not been compared with a reference"),
    ],
)
def test_architectures_without_a_comparison_are_refused_and_why(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name}.*{why}"):
        check_architecture(name)


def test_where_the_residual_stream_alone_was_compared_nothing_else_is_captured() -> None:
    residual_of = {"DeepseekV3ForCausalLM", "MellumForCausalLM"}
    stream = ["hook_embed", "blocks.1.hook_resid_post"]
    check_rows_of("DeepseekV3ForCausalLM", stream, residual_of, telemetry=False)
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.attn\.hook_rot_q.*DeepseekV3.*residual stream alone.*MLA"):
        check_rows_of("DeepseekV3ForCausalLM", [*stream, "blocks.0.attn.hook_rot_q"], residual_of, telemetry=False)
    with pytest.raises(UnsupportedError, match=r"`telemetry` of MellumForCausalLM.*residual stream alone"):
        check_rows_of("MellumForCausalLM", stream, residual_of, telemetry=True)
    with pytest.raises(UnsupportedError, match="MellumForCausalLM has not been compared"):
        check_rows_of("MellumForCausalLM", stream, (), telemetry=False)
    check_rows_of("LlamaForCausalLM", [*stream, "blocks.0.attn.hook_q"], (), telemetry=True)


_SLIDING = "sliding_attention"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 2048},
        {"sliding_window": 16, "use_sliding_window": False},
        {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention"]},
    ],
)
def test_a_window_that_no_request_reaches_is_none(config: dict[str, object]) -> None:
    check_sliding_window(config, 2048)


@pytest.mark.parametrize(
    "more", [{}, {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}]
)
def test_a_window_that_sglang_ignores_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match=r"window of 1024 tokens, which SGLang ignores.*up to 2048") as refused:
        check_sliding_window({"sliding_window": 1024, **more}, 2048)
    assert "context_length: 1024" in str(refused.value)
    check_sliding_window({"sliding_window": 1024, **more}, 2048, "MellumForCausalLM")


def test_keys_and_values_have_kv_heads() -> None:
    names = ["hook_embed", "blocks.0.hook_resid_post", *(f"blocks.0.{site}" for site in ATTENTION)]
    found = head_counts(names, heads=8, kv_heads=2, head_dim=16)
    assert set(found) == {h.name for h in attention_points(names)}
    assert {h for h, (heads, _) in found.items() if heads == 8} == {"blocks.0.attn.hook_q", "blocks.0.attn.hook_rot_q"}
    assert {tuple(x) for x in found.values()} == {(8, 16), (2, 16)}


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("blocks.*.hook_resid_post", range(12)),
        ("blocks.{4..7}.hook_resid_post", range(4, 8)),
        ("blocks.{0..11..5}.hook_resid_post", (0, 5, 10)),
        ("blocks.{0, 5,10}.hook_resid_post", (0, 5, 10)),
        ("blocks.{1,4..5}.hook_resid_post", (1, 4, 5)),
        ("blocks.{7..7}.hook_resid_post", (7,)),
        ("blocks.3.hook_resid_post", (3,)),
    ],
)
def test_a_pattern_means_the_names_of_its_layers(pattern: str, layers: Any) -> None:
    assert expand([pattern], 12) == [f"blocks.{i}.hook_resid_post" for i in layers]


def test_names_that_several_patterns_mean_are_there_once_and_in_order() -> None:
    assert expand(["hook_embed", "blocks.{1,0}.attn.hook_v", "blocks.*.attn.hook_v", "hook_embed"], 3) == [
        "hook_embed",
        "blocks.1.attn.hook_v",
        "blocks.0.attn.hook_v",
        "blocks.2.attn.hook_v",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.010.hook_resid_post", "no leading zeros(.|\n)*write `blocks.10.hook_resid_post`"),
        ("blocks.{5..2}.hook_resid_post", "`5..2` is no range of layers"),
        ("blocks.{0..9..0}.hook_resid_post", "`0..9..0` is no range"),
        ("blocks.{}.hook_resid_post", "`` is no layer"),
        ("blocks.{a}.hook_resid_post", "`a` is no layer"),
        ("blocks.{0-4}.hook_resid_post", "`0-4` is no layer(.|\n)*`blocks.{4..12}.`"),
        ("blocks.{0..99999999999}.hook_resid_post", "is no range"),
        ("blocks.٣.hook_resid_post", "unknown hook point"),
        ("blocks.*", "unknown hook point"),
        ("blocks.**.hook_resid_post", "unknown hook point"),
        ("blocks.5.hook_resid_pre", "use `blocks.4.hook_resid_post`"),
        ("blocks.0.hook_resid_pre", "use `hook_embed`"),
        ("blocks.{0..2}.hook_resid_pre", "`hook_embed`, `blocks.0.hook_resid_post`, `blocks.1.hook_resid_post`"),
        ("blocks.*.hook_resid_pre", "`hook_embed` for layer 0, and `blocks.*.hook_resid_post`"),
        ("blocks.3.hook_mlp_out", "is not captured: it is the output of the MLP"),
        ("blocks.3.hook_attn_out", "is not captured: it is the output of the attention"),
        ("blocks.3.attn.hook_z", "is not captured: it is the output of each head"),
        ("blocks.3.attn.hook_pattern", "capture `attn.hook_rot_q` and `attn.hook_rot_k`"),
        ("ln_final.hook_normalized", "is not captured: it is the output of the final norm"),
        ("model.layers.3", "is the name of a module"),
        ("blocks.3.hook_v", "did you mean `blocks.3.attn.hook_v`"),
        ("blocks.3.hook_resid_pst", "did you mean `blocks.3.hook_resid_post`"),
        ("hook_resid_post", "did you mean `blocks.*.hook_resid_post`"),
    ],
)
def test_what_is_no_pattern_is_told_what_there_is(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse_pattern(name)
    assert re.search(re.escape(said).replace(re.escape("(.|\n)*"), "(.|\n)*"), str(e.value)), str(e.value)
    with pytest.raises(ConfigError):
        parse_hook_point(name)


def test_a_run_holds_names_and_no_patterns() -> None:
    for pattern in ("blocks.*.hook_resid_post", "blocks.{1,2}.hook_resid_post", "blocks.01.hook_resid_post"):
        with pytest.raises(ConfigError):
            parse_hook_point(pattern)
