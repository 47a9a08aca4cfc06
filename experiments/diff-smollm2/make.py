"""Write code-prose.jsonl and tone.jsonl: two pairs of groups of texts, made anew from what is on any machine.

    python experiments/diff-smollm2/make.py            # beside this file; the same bytes each time

*Code against prose*: of each module of the standard library its code without docstrings and comments, and its
docstrings without code. The family is the module, so that each is compared with itself.

*Polite against rude*: requests to an assistant, the same task in either tone. The family is the pair of frames, not the
task: a frame is what carries the tone, and its five tasks are no independent observations of it.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_probe.workload.corpus import Document, load_corpus

SEED = 0
MODULES, CHARACTERS = 64, 900
TASKS_PER_FRAME = 5
FRAMES = [
    ("Could you please {}? Thank you very much.", "{} already. How slow can you be?"),
    ("Hello! I would be grateful if you could {}.", "Stop wasting my time and {}."),
    ("Would you mind helping me? I need to {}.", "Are you too stupid to {}? Do it."),
    ("When you have a moment, could you {}, please?", "I am sick of asking. {} now!"),
    ("Thanks for your help so far. Could you {} next?", "Your last answer was garbage. {}, and do it right."),
    ("Sorry to trouble you again, but could you {}?", "What is wrong with you? Just {}."),
    ("It would be so kind of you to {}.", "Quit your whining and {}."),
    ("If it is not too much to ask, please {}.", "Nobody cares what you think. {}."),
    ("Good morning! May I ask you to {}?", "Wake up, you useless thing, and {}."),
    ("I really appreciate your patience. Could you {}?", "You never get anything right. {}, idiot."),
    ("Dear assistant, please be so good as to {}.", "Listen, you piece of junk: {}."),
    ("I hope you are well. Could you possibly {}?", "Shut up with the apologies and {}."),
    ("Thank you in advance! I would like you to {}.", "A child could do this. {}, if you even can."),
    ("Might I trouble you to {}? That would be lovely.", "Get on with it and {}, for once."),
    ("Please {}. I appreciate it a lot!", "{}. And spare me your nonsense."),
    ("You have been wonderful. Would you kindly {}?", "You have been worthless. {}."),
    ("May I please have your help? I want to {}.", "Do your job for a change: {}."),
    ("I would love it if you could {}. Many thanks!", "I hate talking to you. {} and be quiet."),
    ("Excuse me, could you help me to {}?", "Hey, dummy, {}."),
    ("With your kind help I would like to {}, please.", "Even a broken toaster can {}. Can you?"),
    ("Would it be all right to ask you to {}? Thank you!", "I do not want excuses. {}."),
    ("Please take your time, and {} when it suits you.", "Hurry up, this is pathetic. {}."),
    ("I am very thankful for your work. Could you {}?", "Your work is a disgrace. {}, right now."),
    ("Could I ask a small favour? Please {}.", "How dumb do you have to be? {}."),
    ("Your advice is always so helpful. Would you {}?", "Your advice is always rubbish. {} anyway."),
    ("Hi there, and thank you! Could you please {}?", "Ugh, you again. {}, and make it short."),
    ("I would be delighted if you would {}.", "It makes me angry that I must tell you to {}."),
    ("Forgive me for asking, but would you {}, please?", "Do not make me repeat myself. {}!"),
    ("Many thanks for being here. Please {} if you can.", "You are the worst assistant ever. {}."),
    ("No rush at all, but could you {}? Thanks!", "Move it. {}. I am losing my temper."),
    ("I know that you are busy. Could you please {}?", "I know that you are clueless. {} regardless."),
    ("It is a pleasure to talk with you. Would you {}?", "Talking to you is torture. {}, and that is all."),
]
"""Polite and rude ways to ask, by number: ours, written for this."""
TASKS = """explain how a bicycle stays upright
list three countries in South America
describe the water cycle
write a short poem about autumn
suggest a recipe with lentils
translate the word for house into French
compare tea and coffee
summarise the story of Cinderella
name the planets in order
give me tips for sleeping better
explain what a prime number is
draft an email to my landlord
recommend a book about the sea
convert five miles into kilometres
describe how bread is made
tell me how to change a tyre
explain photosynthesis
plan a day in a small town
write a sentence with the word lantern
list the months with thirty days
explain why the sky is blue
suggest a name for a cat
describe a volcano
tell me what a noun is
give an example of a metaphor
write the opening of a detective story
explain how vaccines work
name four musical instruments
describe the taste of a lemon
tell me how to remove a coffee stain
explain what inflation means
suggest exercises for a sore back
write a birthday greeting for my aunt
describe a chessboard
tell me the boiling point of water
explain how to tie a bow
list five vegetables
write a headline about the weather
describe the life of a bee
explain what a mortgage is""".splitlines()


def main() -> None:
    """Write both files."""
    for name, records in (("code-prose", _code_and_prose()), ("tone", _tones())):
        text = "".join(json.dumps(r) + "\n" for r in records)
        Path(__file__).with_name(f"{name}.jsonl").write_text(text, encoding="utf-8")


def _code_and_prose() -> Iterator[dict[str, Any]]:
    draw = random.Random(SEED)
    documents = list(load_corpus("stdlib").documents)
    draw.shuffle(documents)
    found = 0
    for document in documents:
        texts = _parts(document)
        if texts is None:
            continue
        for kind, text in texts.items():
            cut = text[:CHARACTERS]
            yield {"prompt": cut, "family": document.module, "labels": {"kind": [[0, len(cut), kind]]}}
        found += 1
        if found == MODULES:
            return


def _parts(document: Document) -> dict[str, str] | None:
    """Code and prose of a module; None where there is too little of either."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return None
    prose = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc is not None:
                prose += [p for p in re.split(r"\n\s*\n", doc) if _reads(p)]
                node.body = node.body[1:] or [ast.Pass()]
    code, text = ast.unparse(tree), "\n\n".join(prose)
    return {"code": code, "prose": text} if min(len(code), len(text)) >= CHARACTERS else None


def _reads(paragraph: str) -> bool:
    """Whether a paragraph is sentences: mostly letters, no examples, no lists of names."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    plain = not re.search(r">>>|::|[={}\[\]_|]|^\s*[-*]", paragraph, re.MULTILINE)
    return len(paragraph) >= 60 and letters >= 0.92 * len(paragraph) and plain


def _tones() -> Iterator[dict[str, Any]]:
    draw = random.Random(SEED)
    for number, frames in enumerate(FRAMES):
        for task in draw.sample(TASKS, TASKS_PER_FRAME):
            for tone, frame in zip(("polite", "rude"), frames, strict=True):
                text = re.sub(r"(?:^|[.?!:] )[a-z]", lambda m: m[0].upper(), frame.format(task))
                labels = {"tone": [[0, len(text), tone]]}
                message = {"role": "user", "content": text, "labels": labels}
                yield {"messages": [message], "family": f"frame-{number:02}"}


if __name__ == "__main__":
    main()
