"""Recipe of `probe-recall`, a model with ground truth: a tiny Llama that retrieves facts from noise.

    python models/probe-recall/train.py [--seed 0] [--tasks recall chase copy] [--out FOLDER] [--state FILE]

Text: the puzzles of `sglang_probe.workload.facts` (recall, chase, copy), drawn afresh for every step. Loss: the answers
only. Model: Llama with two layers, grouped-query attention and tied embeddings, trained from scratch in float32 on one
CPU thread and stored as bf16 safetensors. Curriculum: a stage ends when every task's training accuracy has passed a
threshold; after the last one the learning rate decays to zero. The draws depend on seed and step alone, so a run
resumed from `--state` continues the very run. `train.json` beside the checkpoint records what was run and how well the
stored weights, computed with in float32, answer puzzles that no step drew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sglang_probe.model import tiny
from sglang_probe.workload.facts import KEYS, SEPARATOR, TASKS, VALUES, WORDS, Puzzle, Task, draw_puzzle

IDS = {word: i for i, word in enumerate(WORDS)}
CONTEXT = 1024
PEAK_LR, WARM_UP, DECAY_STEPS, MAX_STEPS = 3e-3, 200, 1500, 40_000
TOKENS_PER_STEP = 3600
STATE_EVERY = 500


@dataclass(frozen=True)
class Stage:
    """Puzzles of up to `body` tokens, with up to `pairs` facts (recall, chase) or `spans` facts of `span` symbols."""

    body: int
    pairs: int
    answers: int
    spans: int
    span: int


STAGES = [Stage(48, 8, 8, 3, 6), Stage(96, 16, 12, 4, 8), Stage(160, 28, 14, 6, 8), Stage(272, 48, 16, 8, 8)]
PASS = 0.97
"""Training accuracy (moving average) of the worst task that ends a stage."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `<bos>` is put before every prompt."""
    return tiny.tokenizer(IDS, context=CONTEXT, bos=True)


def build_model() -> LlamaForCausalLM:
    return tiny.llama(IDS, layers=2, context=CONTEXT, rope_theta=10000.0, rms_norm_eps=1e-5)


def prompt_ids(puzzle: Puzzle) -> list[int]:
    return [IDS[w] for w in ("<bos>", *puzzle.body, SEPARATOR, *puzzle.question)]


def draw(task: Task, rng: random.Random, stage: Stage) -> Puzzle:
    """A puzzle of any size up to the stage's, so that short and sparse ones stay known.

    Which symbols are keys and which are values is drawn anew for each: one circuit then serves all tasks, where with
    fixed classes a run learned to chase keys and stayed on the plateau with recall.
    """
    symbols = rng.sample(KEYS + VALUES, len(KEYS) + len(VALUES))
    keys, values = symbols[: len(KEYS)], symbols[len(KEYS) :]
    scale = rng.uniform(0.6, 1.0)
    body = round(stage.body * scale)
    if task == "copy":
        span = rng.randint(min(4, stage.span), stage.span)
        return draw_puzzle(
            task,
            rng,
            body=body,
            facts=rng.randint(1, min(stage.spans, body // (span + 2))),
            answers=span,
            span=span,
            keys=keys,
            values=values,
        )
    pairs = rng.randint(max(2, round(stage.pairs * scale * 0.5)), round(stage.pairs * scale))
    return draw_puzzle(task, rng, body=body, facts=pairs, answers=min(pairs, stage.answers), keys=keys, values=values)


@dataclass
class Batch:
    """`ids` and `inputs`-aligned `targets` `[n, t]` int64 (-100: no loss); `task` `[n]`."""

    ids: torch.Tensor
    targets: torch.Tensor
    task: torch.Tensor


def collate(puzzles: list[Puzzle]) -> Batch:
    rows, targets = [], []
    for p in puzzles:
        prompt = prompt_ids(p)
        rows.append(prompt + [IDS[w] for w in p.continuation[:-1]])
        target = [tiny.UNGRADED] * len(rows[-1])
        for step, answer in zip(p.answer_steps, p.answers, strict=True):
            target[len(prompt) - 1 + step] = IDS[answer]
        targets.append(target)
    return Batch(
        tiny.padded(rows, IDS[tiny.PAD]),
        tiny.padded(targets, tiny.UNGRADED),
        torch.tensor([TASKS.index(p.task) for p in puzzles]),
    )


def answer_logits(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[m, vocab]` at the `m` answers of the batch, their targets `[m]` and their tasks `[m]`."""
    logits, targets, graded = tiny.graded_logits(model, batch.ids, batch.targets)
    return logits, targets, batch.task[:, None].expand_as(graded)[graded]


@dataclass
class Run:
    """Where a run stands. Everything besides the weights and the optimizer that a resumed run needs."""

    step: int = 0
    tokens: int = 0
    tasks: list[Task] = field(default_factory=lambda: list(TASKS))
    seconds: float = 0.0
    stage: int = 0
    decay_from: int | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    stages_passed: list[dict[str, float]] = field(default_factory=list)

    def learning_rate(self) -> float:
        rate = PEAK_LR * min(1.0, (self.step + 1) / WARM_UP)
        return rate if self.decay_from is None else rate * max(0.0, 1 - (self.step - self.decay_from) / DECAY_STEPS)

    @property
    def done(self) -> bool:
        return self.step >= MAX_STEPS or (self.decay_from is not None and self.step >= self.decay_from + DECAY_STEPS)


def train(model: LlamaForCausalLM, seed: int, tasks: list[Task], state: Path | None, stop_seconds: float) -> Run:
    optimizer = tiny.optimizer(model, PEAK_LR)
    run = Run(tasks=tasks, accuracy=dict.fromkeys(tasks, 0.0))
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run = Run(**saved["run"])
    with Progress(transient=True) as progress:
        bar = progress.add_task("training", total=MAX_STEPS, completed=run.step)
        while not run.done and run.seconds < stop_seconds:
            started = time.monotonic()
            loss = _step(model, optimizer, run, random.Random(f"{seed}/{run.step}"))
            run.seconds += time.monotonic() - started
            progress.update(bar, completed=run.step, description=f"stage {run.stage} loss {loss:.3f}")
            if run.step % 100 == 0:
                shown = " ".join(f"{t} {a:.3f}" for t, a in run.accuracy.items())
                where = f"step {run.step} stage {run.stage} {run.seconds:.0f} s {run.tokens:,} tokens"
                progress.console.print(f"{where} loss {loss:.3f} {shown}", soft_wrap=True)
            if state is not None and (run.step % STATE_EVERY == 0 or run.done):
                content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": asdict(run)}
                torch.save(content, state.with_suffix(".new"))
                state.with_suffix(".new").replace(state)
    return run


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, run: Run, rng: random.Random) -> float:
    # One batch in five is of an earlier stage.
    stage = STAGES[rng.randrange(run.stage + 1) if rng.random() < 0.2 else run.stage]
    count = max(2, round(TOKENS_PER_STEP / len(run.tasks) / (stage.body + 2 * stage.answers)))
    batch = collate([draw(task, rng, stage) for task in run.tasks for _ in range(count)])
    logits, targets, tasks = answer_logits(model, batch)
    losses = F.cross_entropy(logits, targets, reduction="none")
    loss = torch.stack([losses[tasks == TASKS.index(task)].mean() for task in run.tasks]).mean()
    tiny.descend(model, optimizer, loss, run.learning_rate())
    run.step += 1
    run.tokens += batch.ids.numel()
    right = logits.detach().argmax(-1) == targets
    if stage == STAGES[run.stage]:
        for task in run.tasks:
            now = right[tasks == TASKS.index(task)].float().mean().item()
            run.accuracy[task] += 0.05 * (now - run.accuracy[task])
    if min(run.accuracy.values()) > PASS and run.decay_from is None:
        run.stages_passed.append({"step": run.step, "tokens": run.tokens, "seconds": round(run.seconds, 1)})
        if run.stage + 1 < len(STAGES):
            run.stage += 1
            run.accuracy = dict.fromkeys(run.tasks, 0.0)
        else:
            run.decay_from = run.step
    return loss.item()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, seed: int, tasks: list[Task], prompts: int = 200) -> list[dict[str, Any]]:
    """Teacher-forced greedy accuracy per answer, by task and size, on puzzles that no training step drew."""
    model.eval()
    rows: list[dict[str, Any]] = []
    for stage in [*STAGES, Stage(400, 60, 16, 8, 8)]:
        for task in tasks:
            rng = random.Random(f"held out/{seed}/{task}/{stage.body}")
            facts, answers = (stage.spans, stage.span) if task == "copy" else (stage.pairs, min(stage.pairs, 16))
            right: list[torch.Tensor] = []
            for _ in range(0, prompts, 20):
                puzzles = [
                    draw_puzzle(task, rng, body=stage.body, facts=facts, answers=answers, span=stage.span)
                    for _ in range(20)
                ]
                logits, targets, _ = answer_logits(model, collate(puzzles))
                right.append(logits.argmax(-1) == targets)
            graded = torch.cat(right).view(-1, answers)
            rows.append(
                {
                    "task": task,
                    "prompt_tokens": stage.body + 4,
                    "facts": facts,
                    "answers": answers,
                    "prompts": len(graded),
                    "accuracy": round(graded.float().mean().item(), 4),
                    "first_answer": round(graded[:, 0].float().mean().item(), 4),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--state", type=Path, help="file to save the run to, and to resume it from")
    parser.add_argument("--stop-seconds", type=float, default=float("inf"), help="stop training early")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    model = build_model()
    run = train(model, args.seed, args.tasks, args.state, args.stop_seconds)
    checkpoint = args.out / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    build_tokenizer().save_pretrained(checkpoint)
    record = {
        "recipe": "models/probe-recall/train.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
        "tasks": args.tasks,
        "threads": args.threads,
        "steps": run.step,
        "training_tokens": run.tokens,
        "seconds": round(run.seconds),
        "finished": run.done and run.decay_from is not None,
        "stages": [asdict(s) for s in STAGES],
        "stages_passed": run.stages_passed,
        "held_out_accuracy": evaluate(model.float(), args.seed, args.tasks),
        "weights_sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(),
    }
    (args.out / "train.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
