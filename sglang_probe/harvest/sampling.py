"""Sampling values, checked before an engine starts: by SGLang's own rules, grammars by its grammar compiler."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest.engine import sampling_parameter_names, verify_sampling
from sglang_probe.harvest.model import Model
from sglang_probe.workload.openai_batch import SGLANG_NAMES

_OTHER_NAMES = {
    **{theirs: ours for theirs, ours in SGLANG_NAMES.items() if theirs != ours},
    "random_seed": "sampling_seed",
    "max_length": "max_new_tokens",
    "num_beams": "beam_width",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "guided_regex": "regex",
    "guided_json": "json_schema",
    "guided_grammar": "ebnf",
    "repeat_penalty": "repetition_penalty",
}
"""What other engines call SGLang's parameters."""
_HINTS = {
    **{theirs: f"; did you mean `{ours}`?" for theirs, ours in _OTHER_NAMES.items()},
    "do_sample": ": set `temperature: 0.0` for greedy outputs",
    "logprobs": ": a run has no log-probabilities",
    "top_logprobs": ": a run has no log-probabilities",
    "response_format": ": give `json_schema`, a JSON schema as text",
}


class SamplingCheck:
    """Checks the sampling parameters of requests of one model; each distinct set of values once.

    Args:
        server: SGLang server arguments, for the grammar's backend.
    """

    def __init__(self, model: Model, server: Mapping[str, Any]) -> None:
        self.model = model
        self._backend = server.get("grammar_backend") or "xgrammar"
        self._passed: set[str] = set()

    def __call__(self, params: Mapping[str, Any]) -> None:
        """Refuse what SGLang would refuse, and what gives several outputs.

        Raises:
            ConfigError, UnsupportedError: name the parameter and the value.
        """
        values = {k: v for k, v in params.items() if k != "custom_params"}
        key = json.dumps(values, sort_keys=True, default=repr)
        if key in self._passed:
            return
        check_names(params, sampling_parameter_names(), "sampling parameter", _HINTS)
        for name in ("n", "beam_width"):
            if values.get(name) not in (None, 1):
                raise UnsupportedError(
                    f"`{name}: {values[name]}` gives several outputs for one request",
                    fix="repeat the request in the workload instead",
                )
        for name in ("json_schema", "structural_tag"):
            if isinstance(values.get(name), dict):
                raise ConfigError(f"sampling value `{name}`: SGLang takes JSON as text, not a mapping", fix="quote it")
        said = verify_sampling(values, self.model.vocabulary, self.model.tokenizer) or self._grammar(values)
        if said is not None:
            raise ConfigError(f"SGLang refuses the sampling values: {said}")
        self._passed.add(key)

    def _grammar(self, values: Mapping[str, Any]) -> str | None:
        """What is wrong with the grammar that constrains the output, if one does."""
        constraints = [k for k in ("regex", "json_schema", "ebnf", "structural_tag") if values.get(k)]
        if not constraints:
            return None
        (name,) = constraints  # SGLang's own checks refuse several
        text = values[name]
        if self._backend == "none":
            return f"`{name}` needs a `grammar_backend`, and the server argument says `none`"
        try:
            if name in ("json_schema", "structural_tag"):
                json.loads(text)
            if self._backend == "xgrammar":
                if name in (compilers := _compilers()):
                    compilers[name](text)
            elif name == "regex":
                re.compile(text)
        except (ValueError, RuntimeError, re.error, RecursionError) as e:
            return f"`{name}: {text[:200]}`: {str(e).strip()}"
        return None


def _compilers() -> dict[str, Callable[[str], Any]]:
    """Those of SGLang's default backend (`constrained/xgrammar_backend.py`), which need no tokenizer."""
    try:
        from xgrammar import Grammar
    except ImportError:  # SGLang is installed without it
        return {}
    return {"regex": Grammar.from_regex, "json_schema": Grammar.from_json_schema, "ebnf": Grammar.from_ebnf}


def check_names(given: Iterable[str], known: set[str], what: str, hints: Mapping[str, str] | None = None) -> None:
    """Refuse names that SGLang does not know.

    Raises:
        ConfigError: the first of them, with its hint, or the nearest known one.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (hints or {}).get(name) or (f"; did you mean `{near[0]}`?" if near else "")
            raise ConfigError(f"{what} `{name}` is unknown to SGLang{hint}")
