"""Which positions does `probe-recall` read? Found by knock-out, because facts need not lie where a human looks.

    python models/probe-recall/inspect_need.py [--model models/probe-recall/checkpoint] [--out need.json]

Offsets are relative to the answer's word in its fact: in `k v ;` the key is -1, the value 0, the delimiter +1. Puzzles
are teacher-forced and none was trained on. Offsets are found by removal, all at once: a model that reads a fact at two
places answers without either. Of the offsets that an answer's query gives most attention, and of those whose removal
from its sight costs most, as many are given back as can be without the model answering better than `LOST`, those with
the least attention first. The rest are what answers are read from.

`need.json` holds these offsets, and the accuracy on fresh puzzles of several lengths, once all queries behind the
context see of it only its first and last position (`<bos>` and the separator) and: the offsets found, each one of them
alone, what a human would keep (the key or symbol before the answer, and the answer), as many random positions, nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from sglang_probe.workload.facts import SEPARATOR, TASKS, WORDS, Puzzle, Task, draw_puzzle

IDS = {word: i for i, word in enumerate(WORDS)}
OFFSETS = range(-8, 71)
CONTENT = (-1, 0)
ANSWERS = 8
LOST = 0.1
"""Accuracy at which a fact counts as out of sight (recall and chase guess one of 24 facts)."""
Keep = Callable[[int, list[int]], set[int]]


@dataclass
class Puzzles:
    """Puzzles of one task and length. `n` puzzles of `t` tokens, `m` answers each.

    `ids` `[n, t]`; `context` positions before the question; `rows` `[m]`: the position whose query gives each answer;
    `answers` `[n, m]` token ids; `at` `[n, m]`: position of each answer's word in the context.
    """

    task: Task
    ids: torch.Tensor
    context: int
    rows: torch.Tensor
    answers: torch.Tensor
    at: torch.Tensor

    @staticmethod
    def draw(task: Task, prompts: int, prompt_tokens: int, seed: str) -> Puzzles:
        rng = random.Random(f"need/{seed}/{task}/{prompt_tokens}")
        body = prompt_tokens - 4
        facts = min(6, body // 12) if task == "copy" else min(24, body // 6)
        drawn = [draw_puzzle(task, rng, body=body, facts=facts, answers=ANSWERS, span=ANSWERS) for _ in range(prompts)]
        rows = [_ids(p) for p in drawn]
        steps = torch.tensor(drawn[0].answer_steps)
        at = [[1 + p.facts[f].start + o for f, o in zip(p.asked, p.offsets, strict=True)] for p in drawn]
        answers = [[IDS[w] for w in p.answers] for p in drawn]
        return Puzzles(
            task, torch.tensor(rows), body + 2, steps + prompt_tokens - 1, torch.tensor(answers), torch.tensor(at)
        )

    def log_probs(self, model: LlamaForCausalLM, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log probability `[n, m]` of the right answers and whether each is the likeliest, under `mask` `[n, t, t]`."""
        found, right = [], []
        for i in range(0, len(self.ids), 20):
            part = slice(i, i + 20)
            bias = torch.zeros(mask[part].shape).masked_fill(~mask[part], torch.finfo(torch.float32).min)
            hidden = model.model(input_ids=self.ids[part], attention_mask=bias[:, None], use_cache=False)
            logits = model.lm_head(hidden.last_hidden_state[:, self.rows])
            target = self.answers[part]
            found.append(logits.log_softmax(-1).gather(-1, target[..., None])[..., 0])
            right.append(logits.argmax(-1) == target)
        return torch.cat(found), torch.cat(right)

    def causal(self) -> torch.Tensor:
        n, t = self.ids.shape
        return torch.ones(t, t, dtype=torch.bool).tril().expand(n, t, t).clone()

    def without(self, offsets: Sequence[int]) -> torch.Tensor:
        """The causal mask in which each answer's query does not see its own offsets."""
        mask = self.causal()
        for i, row in enumerate(self.at.tolist()):
            for query, at in zip(self.rows.tolist(), row, strict=True):
                mask[i, query, [at + o for o in offsets if 0 < at + o < self.context]] = False
        return mask

    def keeping(self, keep: Keep) -> torch.Tensor:
        """The causal mask in which queries behind the context see of it only `keep`, its first and last position."""
        mask = self.causal()
        mask[:, self.context :, : self.context] = False
        for i, row in enumerate(self.at.tolist()):
            kept = {p for p in keep(i, row) if 0 < p < self.context} | {0, self.context - 1}
            mask[i, self.context :, sorted(kept)] = True
        return mask


def _ids(puzzle: Puzzle) -> list[int]:
    words = ("<bos>", *puzzle.body, SEPARATOR, *puzzle.question, *puzzle.continuation[:-1])
    return [IDS[w] for w in words]


def at_offsets(offsets: Sequence[int]) -> Keep:
    return lambda _, row: {at + o for at in row for o in offsets}


def at_random(count: list[int], context: int) -> Keep:
    return lambda i, _: set(random.Random(i).sample(range(1, context - 1), count[i]))


@torch.no_grad()
def attention_by_offset(model: LlamaForCausalLM, puzzles: Puzzles) -> dict[str, dict[int, float]]:
    """Mean attention mass (over heads, answers and puzzles) of each layer by offset; the largest five."""
    model.set_attn_implementation("eager")
    layers = model(input_ids=puzzles.ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    found: dict[str, dict[int, float]] = {}
    for number, weights in enumerate(layers):
        rows = weights.mean(1)[:, puzzles.rows]  # [n, m, t]
        mass = {}
        for offset in OFFSETS:
            position = puzzles.at + offset
            inside = (position > 0) & (position < puzzles.context)
            picked = rows.gather(-1, position.clamp(0, puzzles.ids.shape[1] - 1)[..., None])[..., 0]
            mass[offset] = (picked * inside).mean().item()
        found[f"layer {number}"] = {o: round(mass[o], 4) for o in sorted(mass, key=lambda o: -mass[o])[:5]}
    return found


@torch.no_grad()
def find_offsets(model: LlamaForCausalLM, puzzles: Puzzles) -> dict[str, Any]:
    """The offsets that an answer is read from, and how they were found."""

    def removed(offsets: Sequence[int]) -> tuple[float, float]:
        log_probs, right = puzzles.log_probs(model, puzzles.without(offsets))
        return log_probs.mean().item(), right.float().mean().item()

    alone = {o: removed([o])[0] for o in OFFSETS}
    attention = attention_by_offset(model, puzzles)
    mass = {o: sum(layer.get(o, 0.0) for layer in attention.values()) for o in OFFSETS}
    found = sorted(set(sorted(alone, key=lambda o: alone[o])[:8]).union(*attention.values()), key=lambda o: mass[o])
    if removed(found)[1] > LOST:
        raise SystemExit(f"{puzzles.task}: without {found} the model still answers; it reads elsewhere")
    for offset in list(found):
        fewer = [o for o in found if o != offset]
        if removed(fewer)[1] <= LOST:
            found = fewer
    without: dict[str, Sequence[int]] = {"nothing": [], **{f"{o:+d}": [o] for o in found}, "all": found}
    return {
        "offsets": sorted(found),
        "accuracy_without": {name: round(removed(offsets)[1], 4) for name, offsets in without.items()},
        "attention_mass": {name: {f"{o:+d}": m for o, m in layer.items()} for name, layer in attention.items()},
    }


@torch.no_grad()
def verify(model: LlamaForCausalLM, puzzles: Puzzles, offsets: list[int]) -> dict[str, float]:
    """Accuracy per answer with the whole context, and with part of it."""
    causal = at_offsets(offsets)
    count = [len({p for p in causal(i, row) if 0 < p < puzzles.context}) for i, row in enumerate(puzzles.at.tolist())]
    masks = {
        "whole_context": puzzles.causal(),
        "needed_causal": puzzles.keeping(causal),
        **({f"{o:+d}": puzzles.keeping(at_offsets([o])) for o in offsets} if len(offsets) > 1 else {}),
        "needed_content": puzzles.keeping(at_offsets(CONTENT)),
        "random_as_many": puzzles.keeping(at_random(count, puzzles.context)),
        "nothing": puzzles.keeping(lambda *_: set()),
    }
    accuracy = {name: puzzles.log_probs(model, mask)[1].float().mean().item() for name, mask in masks.items()}
    return {"positions_kept": round(sum(count) / len(count), 1), **{k: round(v, 4) for k, v in accuracy.items()}}


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=here / "checkpoint")
    parser.add_argument("--out", type=Path, default=here / "need.json")
    parser.add_argument("--prompts", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    tasks: dict[str, Any] = {}
    for task in TASKS:
        seen = Puzzles.draw(task, args.prompts, 228, "search")
        found = find_offsets(model, seen)
        tasks[task] = {
            **found,
            "accuracy": {
                str(n): verify(model, Puzzles.draw(task, 2 * args.prompts, n, "verify"), found["offsets"])
                for n in (120, 164, 228, 276)
            },
        }
        print(task, json.dumps(tasks[task], indent=1), flush=True)
    record = {
        "recipe": "models/probe-recall/inspect_need.py",
        "weights_sha256": hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest(),
        "offset_0": "the answer's word in its fact",
        "prompts": {"search": args.prompts, "verify": 2 * args.prompts, "answers_each": ANSWERS},
        "tasks": tasks,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
