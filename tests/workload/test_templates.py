"""Templates that leave out, move or switch what a chat holds; prompts that were rendered already; what is recorded."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sglang_probe.errors import ConfigError, WorkloadError
from sglang_probe.workload.build import Workload, build_requests
from sglang_probe.workload.jsonl import Jsonl
from sglang_probe.workload.render import Rendered, Renderer
from sglang_probe.workload.rendering import Rendering
from sglang_probe.workload.request import SPECIAL, TEMPLATE, Conversation, Label, Segment

WithTemplate = Callable[[str | None], PreTrainedTokenizerFast]
WriteLines = Callable[[Sequence[Any]], Path]

# As Qwen3's: reasoning of earlier turns is dropped, that of the last is written anew, and the beginning of an answer
# is shut with an empty one if thinking is off.
REASONING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- if m.role == 'assistant' %}
{%- set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{%- set content = '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
{%- endif %}
{%- endif %}
{{- '<|' + m.role + '|>\\n' + content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
DROPS_BEFORE_A_LINE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('====')[-1] }}<|end|>{% endfor %}<|assistant|>"
)
TOLD = "<think>\nadd them\n</think>\n\n4"


def chat(*messages: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Segment(role, text, role, i) for i, (role, text) in enumerate(messages)))


def owned(tokenizer: PreTrainedTokenizerFast, rendered: Rendered, name: str) -> list[str]:
    return [tokenizer.decode(rendered.prompt_ids[s.start : s.end]) for s in rendered.spans if s.name == name]


def as_ids(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, **how: Any) -> tuple[int, ...]:
    messages = [{"role": s.role, "content": s.text} for s in conversation.segments]
    how = {"add_generation_prompt": messages[-1]["role"] != "assistant", **how}
    return tuple(tokenizer.apply_chat_template(messages, return_dict=False, **how))


def test_reasoning_that_a_template_drops_from_history_is_left_out(with_template: WithTemplate) -> None:
    tokenizer = with_template(REASONING)
    asked = chat(("user", "2+2?"), ("assistant", TOLD), ("user", "3+3?"))
    rendered = Renderer(tokenizer).render(asked)
    assert rendered.prompt_ids == as_ids(tokenizer, asked)
    assert owned(tokenizer, rendered, "assistant") == ["4"]
    assert owned(tokenizer, rendered, "user") == ["2+2?", "3+3?"]


@pytest.mark.parametrize("told", [TOLD, "<think>add</think>4", "4", "<think>\n\n</think>\n\n4"])
def test_reasoning_that_a_template_writes_anew_is_the_assistants(with_template: WithTemplate, told: str) -> None:
    tokenizer = with_template(REASONING)
    asked = chat(("user", "2+2?"), ("assistant", told))
    rendered = Renderer(tokenizer).render(asked)
    assert rendered.prompt_ids == as_ids(tokenizer, asked)
    theirs = owned(tokenizer, rendered, "assistant")
    assert theirs[-1].endswith("4")
    assert ("add" in "".join(theirs)) == ("add" in told)
    if told == TOLD:  # to the letter what the assistant said, tags included
        assert theirs == [TOLD]


def test_tags_in_a_users_text_are_the_users(with_template: WithTemplate) -> None:
    tokenizer = with_template(REASONING)
    asked = chat(("user", "why <think>x</think>?"), ("assistant", TOLD), ("user", "</think>"))
    rendered = Renderer(tokenizer).render(asked)
    assert owned(tokenizer, rendered, "user") == ["why <think>x</think>?", "</think>"]


def test_a_content_of_which_a_template_writes_one_part_is_owned_as_far_as_it_is_written(
    with_template: WithTemplate,
) -> None:
    tokenizer = with_template(DROPS_BEFORE_A_LINE)
    text = "notes: 4 ==== the answer is 4"
    label = Label("part", "answer", 14, len(text))
    asked = Conversation((Segment("user", "q", "user", 0), Segment("said", text, "assistant", 1, (label,))))
    rendered = Renderer(tokenizer).render(asked)
    assert rendered.prompt_ids == as_ids(tokenizer, asked)
    assert owned(tokenizer, rendered, "said") == [" the answer is 4"]
    (found,) = rendered.labels
    assert tokenizer.decode(rendered.prompt_ids[found.start : found.end]) == " the answer is 4"


def test_a_part_that_cannot_be_proved_to_be_the_content_is_refused(with_template: WithTemplate) -> None:
    # The template writes a word of its own that stands in the content as well.
    own = "{% for m in messages %}<|{{ m.role }}|>{{ 'four' if 'four' in m.content else m.content }}<|end|>{% endfor %}"
    with pytest.raises(WorkloadError, match="changes the text of a message") as e:
        Renderer(with_template(own)).render(chat(("user", "two and two is four")))
    assert "`prompt_ids`" in str(e.value)


def test_variables_of_the_template_are_given_by_the_workload_or_by_a_record(
    with_template: WithTemplate, write_lines: WriteLines
) -> None:
    tokenizer = with_template(REASONING)
    message = {"messages": [{"role": "user", "content": "hi"}]}
    path = write_lines([message, {**message, "chat_template_kwargs": {"enable_thinking": True}}])
    source = Jsonl(path=path, chat_template_kwargs={"enable_thinking": False})
    off, on = build_requests(source, tokenizer, context_length=None, default_sampling={}).requests
    assert off.prompt_ids == as_ids(tokenizer, chat(("user", "hi")), enable_thinking=False)
    assert on.prompt_ids == as_ids(tokenizer, chat(("user", "hi")))
    assert len(off.prompt_ids) > len(on.prompt_ids)


def test_a_variable_that_the_template_never_reads_is_refused(with_template: WithTemplate) -> None:
    said = r"never reads `enable_thinkng`; did you mean `enable_thinking`\?"
    with pytest.raises(WorkloadError, match=said):
        Renderer(with_template(REASONING), Rendering(chat_template_kwargs={"enable_thinkng": False}))


@pytest.mark.parametrize("begins", [True, False])
def test_the_beginning_of_an_answer_can_be_asked_for_or_left_out(
    tokenizer: PreTrainedTokenizerFast, begins: bool
) -> None:
    renderer = Renderer(tokenizer, Rendering(add_generation_prompt=begins))
    for asked in (chat(("user", "a")), chat(("user", "a"), ("assistant", "b"))):
        assert renderer.render(asked).prompt_ids == as_ids(tokenizer, asked, add_generation_prompt=begins)


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(with_template: WithTemplate, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(REASONING)
    tokenizer = with_template(None)
    asked = chat(("user", "hi"))
    renderer = Renderer(tokenizer, Rendering(chat_template=file))
    assert renderer.render(asked).prompt_ids == as_ids(tokenizer, asked, chat_template=REASONING)
    assert renderer.made_from()["chat_template_sha256"] == hashlib.sha256(REASONING.encode()).hexdigest()
    with pytest.raises(ConfigError, match=r"cannot read `chat_template` .*none\.jinja"):
        Renderer(tokenizer, Rendering(chat_template=tmp_path / "none.jinja"))


def test_a_template_that_writes_the_time_is_followed(
    with_template: WithTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_template("{{ strftime_now('%S') }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    renderer, real, told = Renderer(tokenizer), tokenizer.apply_chat_template, []
    monkeypatch.setattr(renderer._chat, "_ids_to_check", 0)
    clock = iter(["01", "01", "02", "02", "03", "03"])

    def apply(*args: Any, **kwargs: Any) -> Any:
        told.append(next(clock))
        return told[-1] + real(*args, **kwargs)[2:]

    monkeypatch.setattr(tokenizer, "apply_chat_template", apply, raising=False)
    assert owned(tokenizer, renderer.render(chat(("user", "a"))), "user") == ["a"]
    assert owned(tokenizer, renderer.render(chat(("user", "b"))), "user") == ["b"]
    assert told == ["01", "01", "02", "02"]


def test_chats_of_one_shape_share_their_rendering_with_markers(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy.deepcopy(tokenizer)
    renderer, real, calls = Renderer(copied), copied.apply_chat_template, []

    def apply(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(copied, "apply_chat_template", apply, raising=False)
    for text in "abcdefgh":
        renderer.render(chat(("user", text)))
    assert len(calls) == 8 + 1 + 1  # each chat, the markers of their shape, and one whose tokens are compared


@pytest.fixture
def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds BOS to every text, as the tokenizers of Llama 3, Gemma and Mistral do; its template writes BOS too."""
    adding = copy.deepcopy(tokenizer)
    bos = ("<|bos|>", tokenizer.bos_token_id)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[bos])
    return adding


def built(tokenizer: PreTrainedTokenizerFast, path: Path, **options: Any) -> Workload:
    return build_requests(Jsonl(path=path, **options), tokenizer, context_length=None, default_sampling={})


def test_a_prompt_that_was_rendered_already_gets_no_second_bos(
    adding_bos: PreTrainedTokenizerFast, write_lines: WriteLines
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = adding_bos.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    path = write_lines([{"prompt": text}, {"messages": messages}, {"prompt": "hi"}])
    plain, chat, bare = built(adding_bos, path).requests
    assert plain.prompt_ids == chat.prompt_ids
    assert plain.prompt_ids.count(adding_bos.bos_token_id) == 1
    assert bare.prompt_ids[0] == adding_bos.bos_token_id
    assert bare.spans[0].name == SPECIAL
    assert TEMPLATE not in {s.name for s in plain.spans}  # it is the user's own text


@pytest.mark.parametrize(("said", "count"), [(True, 2), (False, 1), ("auto", 1)])
def test_whether_special_tokens_are_added_can_be_said(
    adding_bos: PreTrainedTokenizerFast, write_lines: WriteLines, said: Any, count: int
) -> None:
    bos = adding_bos.bos_token_id
    prompt = {"prompt": "<|bos|>hi"}
    (of_the_workload,) = built(adding_bos, write_lines([prompt]), add_special_tokens=said).requests
    (of_the_record,) = built(adding_bos, write_lines([{**prompt, "add_special_tokens": said}])).requests
    assert of_the_workload.prompt_ids == of_the_record.prompt_ids
    assert of_the_workload.prompt_ids.count(bos) == count
    # What SGLang's /generate makes of a text (`TokenizerManager._tokenize_texts`) is what `true` does.
    assert (list(of_the_workload.prompt_ids) == adding_bos(["<|bos|>hi"])["input_ids"][0]) == (said is True)


def test_what_prompts_were_made_from_is_told(tokenizer: PreTrainedTokenizerFast, write_lines: WriteLines) -> None:
    path = write_lines([{"prompt": "a"}])
    told = built(tokenizer, path, add_special_tokens=False, add_generation_prompt=True).made_from
    assert told["add_special_tokens"] is False
    assert told["add_generation_prompt"] is True
    assert told["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert len(told["tokenizer_sha256"]) == 64
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|new|>"])
    assert built(other, path).made_from["tokenizer_sha256"] != told["tokenizer_sha256"]
