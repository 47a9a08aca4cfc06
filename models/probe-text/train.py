"""Recipe of `probe-text`, the built-in model: a tiny Llama that writes Python.

    python models/probe-text/train.py [--minutes 25] [--out models/probe-text/checkpoint]

Text: the standard library of the running interpreter (`sglang_probe.workload.corpus`), split by file, plus chat
renderings of its documented functions (docstring asked, source answered). Tokenizer: byte-level BPE with a chat
template. Model: Llama with grouped-query attention and tied embeddings, trained from scratch on the CPU in bf16
autocast with fp32 master weights, stored as bf16 safetensors. `train.json` beside the checkpoint records what was run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sglang_probe.workload.corpus import Corpus, Function, is_held_out, load_corpus

VOCAB = 3072
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM_PROMPTS = [
    "You write Python. Answer with the source of the function and nothing else.",
    "You maintain the module `{module}`. Reply with code only.",
    "You are a careful Python programmer working on `{module}`.",
]
CONTEXT = 4096


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte has a token, so any text round-trips."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_text(tokenizer: PreTrainedTokenizerFast, shots: list[Function], rng: random.Random) -> str:
    """A conversation in which each docstring is asked and its source answered."""
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS).format(module=shots[0].module)}]
    for f in shots:
        messages.append({"role": "user", "content": f"Write `{f.signature}`.\n{f.doc}"})
        messages.append({"role": "assistant", "content": f.source})
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def token_stream(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, held_out: bool, seed: int) -> np.ndarray:
    """All documents and all chats of one split in a shuffled order, as one `[n]` uint16 stream."""
    rng = random.Random(seed)
    documents = [d for d in corpus.documents if is_held_out(d) == held_out]
    modules = {d.module for d in documents}
    texts = [f"<|bos|>{d.text}<|end|>\n" for d in documents]
    by_module: dict[str, list[Function]] = {}
    for f in corpus.functions:
        if f.module in modules:
            by_module.setdefault(f.module, []).append(f)
    for functions in by_module.values():
        rng.shuffle(functions)
        while functions:
            shots, functions = functions[:4], functions[4:]
            texts.append(chat_text(tokenizer, shots, rng))
    rng.shuffle(texts)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.array([t for ids in encoded for t in ids], dtype=np.uint16)


def ngram_losses(train: np.ndarray, test: np.ndarray) -> dict[str, float]:
    """Held-out nats per token of an add-one unigram and a bigram backed off to it (weight by absolute discount)."""
    unigram = np.bincount(train, minlength=VOCAB).astype(np.float64) + 1
    unigram /= unigram.sum()
    pairs = np.zeros((VOCAB, VOCAB), dtype=np.float32)
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    discount = 0.75
    totals = pairs.sum(1)
    kinds = (pairs > 0).sum(1)
    a, b = test[:-1], test[1:]
    seen = np.maximum(pairs[a, b] - discount, 0) / np.maximum(totals[a], 1)
    backoff = np.where(totals[a] > 0, discount * kinds[a] / np.maximum(totals[a], 1), 1.0)
    bigram = seen + backoff * unigram[b]
    return {"unigram": float(-np.log(unigram[b]).mean()), "bigram": float(-np.log(bigram).mean())}


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: np.ndarray, length: int = 1024, limit: int = 96) -> float:
    """Mean nats per token over consecutive windows of `length`."""
    model.eval()
    windows = [stream[i : i + length + 1] for i in range(0, len(stream) - length - 1, length)][:limit]
    total = 0.0
    for w in windows:
        ids = torch.from_numpy(w.astype(np.int64))[None]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        total += F.cross_entropy(logits[0].float(), ids[0, 1:]).item()
    model.train()
    return total / len(windows)


def train(model: LlamaForCausalLM, stream: np.ndarray, minutes: float, seed: int, peak_lr: float = 3e-3) -> int:
    """AdamW, linear warm-up, cosine decay by elapsed time. Returns the number of tokens seen."""
    rng = np.random.default_rng(seed)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=peak_lr, betas=(0.9, 0.95)
    )
    start, seen, step, losses = time.time(), 0, 0, []
    while (progress := (time.time() - start) / (minutes * 60)) < 1:
        # Short windows early (cheap attention), long ones late so that the whole context is trained.
        length, batch = (512, 16) if progress < 0.6 else (1024, 8) if progress < 0.9 else (2048, 4)
        offsets = rng.integers(0, len(stream) - length - 1, batch)
        ids = torch.from_numpy(np.stack([stream[o : o + length + 1] for o in offsets]).astype(np.int64))
        lr = peak_lr * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.float().view(-1, VOCAB), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += batch * length
        step += 1
        losses.append(loss.item())
        if step % 50 == 0:
            rate = seen / (time.time() - start)
            print(
                f"{progress:5.1%} step {step} tokens {seen:,} loss {np.mean(losses[-50:]):.3f} {rate:,.0f} tok/s",
                flush=True,
            )
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    corpus = load_corpus("stdlib")
    tokenizer = build_tokenizer([d.text for d in corpus.documents if not is_held_out(d)])
    train_stream = token_stream(tokenizer, corpus, held_out=False, seed=args.seed)
    test_stream = token_stream(tokenizer, corpus, held_out=True, seed=args.seed)
    print(
        f"{len(corpus.documents)} files, {len(train_stream):,} training tokens, {len(test_stream):,} held out",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    started = time.time()
    seen = train(model, train_stream, args.minutes, args.seed)
    seconds = time.time() - started

    model = model.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    weights = (args.out / "model.safetensors").read_bytes()
    record = {
        "recipe": "models/probe-text/train.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "corpus_digest": corpus.digest,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_available": len(train_stream),
        "training_tokens_seen": seen,
        "seconds": round(seconds),
        "threads": args.threads,
        "seed": args.seed,
        "held_out_tokens": len(test_stream),
        "held_out_nats_per_token": {
            "model_bf16": round(held_out_loss(model, test_stream), 4),
            **{k: round(v, 4) for k, v in ngram_losses(train_stream, test_stream).items()},
        },
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    (Path(args.out).parent / "train.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))

    model.eval()
    prompt = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "You write Python. Answer with the source of the function and nothing else."},
            {
                "role": "user",
                "content": "Write `def is_empty(self)`.\nReturn True if the queue is empty, False otherwise.",
            },
        ],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompt, max_new_tokens=96, do_sample=False)
    print(tokenizer.decode(out[0]))


if __name__ == "__main__":
    sys.exit(main())
