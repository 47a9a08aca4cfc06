"""Lines of an OpenAI batch file: the request's `body` is what is served, its sampling values by SGLang's names."""

from __future__ import annotations

import json
from typing import Any

from sglang_probe.workload.rendering import RecordRendering

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_SAME = [
    *("temperature", "top_p", "top_k", "min_p", "stop", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("logit_bias", "stop_token_ids", "stop_regex", "ignore_eos", "regex", "ebnf", "n", "custom_params"),
]
SGLANG_NAMES = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    **{name: name for name in _SAME},
}
"""Names of the API, and SGLang's (`to_sampling_params` in `entrypoints/openai/protocol.py`)."""
_OF_THE_TRANSPORT = frozenset({"model", "user", "metadata", "store", "stream", "stream_options", "service_tier"})

OF_A_BODY = frozenset(SGLANG_NAMES) | {"response_format"}
"""Keys of a body that are sampling values."""


def unwrapped(data: dict[str, Any]) -> dict[str, Any]:
    """A line of a batch file as a line of ours; any other line as it is (a copy).

    Raises:
        ValueError: it asks for another endpoint, or for something that is not supported; names the key.
    """
    if "body" not in data:
        return dict(data)
    if beyond := sorted(data.keys() - {"method", "url", "body"}):
        raise ValueError(f"this looks like a line of an OpenAI batch file, and has `{beyond[0]}` beside its `body`")
    body = data["body"]
    if not isinstance(body, dict):
        raise ValueError(f"`body` is a JSON object, not {type(body).__name__}")
    url = data.get("url", _CHAT)
    if url not in (_CHAT, _COMPLETIONS):
        raise ValueError(f"`url: {url}`: only {_CHAT} and {_COMPLETIONS} make prompts and generate")
    line: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    for key, value in body.items():
        if value is None or key in _OF_THE_TRANSPORT:
            continue
        if key in SGLANG_NAMES:
            sampling[SGLANG_NAMES[key]] = value
        elif key == "response_format":
            sampling |= _constraint(value)
        elif key in ("messages", "prompt", *RecordRendering.model_fields):
            line[key] = value
        elif value not in ([], {}, False):
            raise ValueError(f"`body.{key}` is not supported: it changes the prompt, or what is generated")
    return {**line, **({"sampling_params": sampling} if sampling else {})}


def _constraint(given: Any) -> dict[str, Any]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": '{"type": "object"}'}
    if kind == "json_schema" and isinstance(given.get("json_schema"), dict) and "schema" in given["json_schema"]:
        return {"json_schema": json.dumps(given["json_schema"]["schema"])}
    raise ValueError(f"`body.response_format`: type {kind!r} is not supported")
