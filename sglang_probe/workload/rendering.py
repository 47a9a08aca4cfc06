"""How a conversation becomes a prompt: what a YAML, and a record for itself, may say of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field

from sglang_probe.config import Config, InputPath

RESERVED = frozenset(
    {"self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    | {"continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs"}
)
"""Arguments of `apply_chat_template` that are no variables of a template."""


def _no_arguments(given: dict[str, Any]) -> dict[str, Any]:
    if taken := sorted(RESERVED & given.keys()):
        key = taken[0]
        said = {
            "tools": "tools are not supported",
            "add_generation_prompt": "it is a key of its own, beside `chat_template_kwargs`",
            "chat_template": "it is a key of the workload, and names a file",
        }.get(key, "it is an argument of `apply_chat_template`, and no variable of a template")
        raise ValueError(f"`chat_template_kwargs: {key}`: {said}")
    return given


Variables = Annotated[dict[str, Any], AfterValidator(_no_arguments)]
"""Variables of a chat template; names that a template cannot be given are refused."""


class RecordRendering(Config):
    """What one record may say. Absent: as the workload says."""

    add_special_tokens: bool | Literal["auto"] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: Variables = Field(default_factory=dict)


class Rendering(Config):
    """How the conversations of a workload become prompts."""

    chat_template: InputPath | None = None
    """A file with a chat template (Jinja) in place of the tokenizer's own."""
    chat_template_kwargs: Variables = Field(default_factory=dict)
    """Variables of the template, e.g. `{enable_thinking: false}`."""
    add_generation_prompt: bool | None = None
    """Whether a chat ends with the template's beginning of an answer; by default, unless the assistant spoke last."""
    add_special_tokens: bool | Literal["auto"] = "auto"
    """Whether a plain prompt gets what the tokenizer adds by itself (BOS). `auto`: unless it begins with that already,
    as a prompt does that was rendered with a chat template."""

    def of(self, record: RecordRendering | None) -> Self:
        """With what a record says of itself."""
        if record is None:
            return self
        said = {k: v for k, v in record if v is not None}
        said["chat_template_kwargs"] = {**self.chat_template_kwargs, **record.chat_template_kwargs}
        return self.model_copy(update=said)


def unread(template: str, names: Collection[str]) -> tuple[list[str], set[str]]:
    """Of variables those that a template never reads, and those that it does read; none if it cannot be told."""
    import jinja2
    from jinja2 import meta

    try:
        read = meta.find_undeclared_variables(
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        )
    except jinja2.TemplateError:  # it has tags of its own, e.g. `generation`
        return [], set()
    return sorted(set(names) - read), read - RESERVED - {"strftime_now", "raise_exception", "bos_token", "eos_token"}
