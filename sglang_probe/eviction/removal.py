"""The right answer without some cached positions, by `transformers` on the CPU in float32: no engine is started.

The cache is filled by the whole prompt up to position n, as in the engine under a kept set; then every query from n on
is kept from seeing the removed positions. That is `sglang_probe.eviction.protocol`'s rule: n is the length of the
prompt if the question is visible, that of the context if it is hidden. No head of any layer sees what is removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sglang_probe.errors import ProbeError, UnsupportedError
from sglang_probe.eviction.needed import Score, Scored
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.run.hook_points import REVIEWED_ARCHITECTURES

AT_ONCE = 16
"""Removals in one forward: each needs a copy of the prompt's keys and values."""


class RemovalModel:
    """A model that answers without some positions of its cache.

    Raises (on construction):
        UnsupportedError: `transformers` is not installed, or the model has sliding windows, or another architecture
            than the reviewed ones.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.utils.logging import disable_progress_bar
        except ImportError as e:
            raise UnsupportedError(f"needed positions cannot be found: {e}", fix="pip install transformers") from e
        config = AutoConfig.from_pretrained(path)
        name = (config.architectures or ["unknown"])[0]
        if name not in REVIEWED_ARCHITECTURES:
            raise UnsupportedError(f"removal from {name} has not been reviewed", fix=", ".join(REVIEWED_ARCHITECTURES))
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise UnsupportedError(
                "removal from a model with sliding windows is not supported", fix="use another model"
            )
        disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        self._model.eval()

    def scores(
        self,
        prompt: Sequence[int],
        continuation: Sequence[int],
        steps: Sequence[int],
        protocols: Sequence[Protocol],
        *,
        context: int,
    ) -> dict[Protocol, Score]:
        """What scores one request under each protocol. The prompt is run once, and its cache is held by the scores.

        The first answer is left out where the question is visible, because it comes from the full cache.

        Args:
            continuation: the right output.
            steps: which of its tokens are answers.
            context: positions before the question.

        Raises:
            ProbeError: there is no other answer than one that comes from prefill.
        """
        out = {}
        ids, cache, at = [*prompt, *continuation], None, 0
        for protocol in sorted(protocols, key=lambda p: p is Protocol.QUERY_VISIBLE):
            n = context if protocol is Protocol.QUERY_HIDDEN else len(prompt)
            if n > at:
                cache, at = self._extended(cache, ids[at:n]), n
            out[protocol] = self._score(ids, n, list(cache or ()), _rows(len(prompt), steps, protocol))
        return out

    def _extended(self, cache: Any, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([ids]), past_key_values=_cache(cache or [], 1), use_cache=True, logits_to_keep=1
            )
        return [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    def _score(self, ids: list[int], n: int, cache: list[Any], rows: list[int]) -> Score:
        """Answers are the tokens at `rows` of `ids`, each predicted by the position before it."""
        fed = torch.tensor(ids[n : max(rows)])
        wanted = torch.tensor([ids[r] for r in rows])
        asked = torch.tensor([r - 1 - n for r in rows])
        causal = torch.ones(len(fed), n + len(fed), dtype=torch.bool).tril(n)

        def score(removed: Sequence[frozenset[int]]) -> list[Scored]:
            out: list[Scored] = []
            for i in range(0, len(removed), AT_ONCE):
                part = removed[i : i + AT_ONCE]
                seen = causal.expand(len(part), 1, *causal.shape).clone()
                for j, positions in enumerate(part):
                    if positions and max(positions) >= n:
                        raise ProbeError(f"position {max(positions)} is not in the cache of {n} positions")
                    seen[j, :, :, sorted(positions)] = False
                with torch.inference_mode():
                    logits = self._model(
                        input_ids=fed.expand(len(part), -1),
                        attention_mask=seen,
                        position_ids=torch.arange(n, n + len(fed)).expand(len(part), -1),
                        past_key_values=_cache(cache, len(part)),
                        use_cache=True,
                        logits_to_keep=asked,
                    ).logits
                nats = logits.log_softmax(-1).gather(-1, wanted.expand(len(part), -1)[..., None])[..., 0].sum(-1)
                right = (logits.argmax(-1) == wanted).all(-1)
                out += [Scored(float(x), bool(r)) for x, r in zip(nats, right, strict=True)]
            return out

        return score


def _rows(prompt: int, steps: Sequence[int], protocol: Protocol) -> list[int]:
    """Of each answer that is scored the position in prompt and continuation.

    Raises:
        ProbeError: there is none.
    """
    visible = protocol is Protocol.QUERY_VISIBLE
    rows = [prompt + t for t in steps if t > 0 or not visible]
    if not rows:
        raise ProbeError("the one answer comes from prefill alone", fix="use two `answers` or more")
    return rows


def _cache(layers: list[Any], many: int) -> Any:
    """A cache of `many` copies, which a forward may extend."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (k, v) in enumerate(layers):
        cache.update(k.expand(many, -1, -1, -1), v.expand(many, -1, -1, -1), i)
    return cache
