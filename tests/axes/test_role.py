"""Roles recovered from token ids are those that the renderer knew when it wrote the prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from sglang_probe.axes.axis import Axis
from sglang_probe.axes.batch import Batch
from sglang_probe.axes.role import Role
from sglang_probe.errors import ConfigError
from sglang_probe.workload.render import Renderer
from sglang_probe.workload.request import Conversation, Segment

Make = Callable[..., Batch]
Classes = Callable[[Axis, Batch], list[str]]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# With a default system prompt, and tool results inside a user's message, as Qwen has it.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}"
    "\n</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|bos|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "<|bos|>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|end|>{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
PLAIN_TEXT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]

CHAT = (
    Segment("system", "Be brief.", "system", 0),
    Segment("user", "\n\nWhy is user\nassistant blue?", "user", 1),
    Segment("assistant", "It\nscatters.", "assistant", 2),
    Segment("user", "And <red>?", "user", 3),
)


@pytest.fixture
def with_marks(with_template: Callable[[str], PreTrainedTokenizerFast]) -> Callable[[str], PreTrainedTokenizerFast]:
    def make(template: str) -> PreTrainedTokenizerFast:
        made = with_template(template)
        made.add_tokens([AddedToken(m, special=True, normalized=False) for m in MARKS], special_tokens=True)
        return made

    return make


@pytest.mark.parametrize(
    ("template", "chat"),
    [(None, CHAT), (CHATML, CHAT), (QWEN, CHAT), (QWEN, CHAT[1:]), (LLAMA3, CHAT), (MISTRAL, CHAT[1:])],
    ids=["probe-text", "chatml", "qwen", "qwen default system", "llama3", "mistral"],
)
def test_roles_are_those_of_the_renderer(
    template: str | None,
    chat: tuple[Segment, ...],
    tokenizer: PreTrainedTokenizerFast,
    with_marks: Callable[[str], PreTrainedTokenizerFast],
    make_batch: Make,
    classes: Classes,
) -> None:
    tokenizer = with_marks(template) if template else tokenizer
    rendered = Renderer(tokenizer).render(Conversation(chat))
    known = [s.name for s in rendered.spans for _ in range(s.start, s.end)]
    answer = tokenizer("Green.", add_special_tokens=False)["input_ids"]
    ids = [*rendered.prompt_ids, *answer]
    found = classes(Role(tokenizer), make_batch(ids, ids))
    expected = [*known, *["assistant"] * len(answer)] * 2
    if template == QWEN and chat[0].role == "user":
        # The renderer knows that the template wrote the default system prompt; ids alone say that it is the system's.
        found = ["template" if name == "system" else name for name in found]
    assert list(zip(tokenizer.convert_ids_to_tokens(ids * 2), found, strict=True)) == list(
        zip(tokenizer.convert_ids_to_tokens(ids * 2), expected, strict=True)
    )


def test_a_prompt_that_did_not_go_through_the_template_is_plain(
    tokenizer: PreTrainedTokenizerFast, make_batch: Make, classes: Classes
) -> None:
    plain = tokenizer("import json")["input_ids"]
    chat = Renderer(tokenizer).render(Conversation(CHAT)).prompt_ids
    found = classes(Role(tokenizer), make_batch(chat, [*plain, -1]))
    assert found[len(chat) :] == ["plain"] * len(plain) + ["unknown"]


def test_a_tool_result_inside_a_users_message_is_the_tools(
    with_marks: Callable[[str], PreTrainedTokenizerFast], make_batch: Make, classes: Classes
) -> None:
    tokenizer = with_marks(QWEN)
    chat = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "run"},
        {"role": "tool", "content": "42"},
    ]
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    found = classes(Role(tokenizer), make_batch(ids))
    by_role = {n: tokenizer.decode([i for i, f in zip(ids, found, strict=True) if f == n]) for n in set(found)}
    assert (by_role["user"], by_role["assistant"]) == ("ask", "run")
    assert by_role["tool"].startswith("42")


@pytest.mark.parametrize(("template", "message"), [(None, "no chat template"), (PLAIN_TEXT, "ordinary text")])
def test_a_template_without_special_tokens_is_refused(
    template: str | None, message: str, with_template: Callable[[str | None], PreTrainedTokenizerFast]
) -> None:
    with pytest.raises(ConfigError, match=message):
        Role(with_template(template))
