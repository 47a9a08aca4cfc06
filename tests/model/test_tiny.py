"""What the recipes of tiny models share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sglang_probe.model import tiny

IDS = {w: i for i, w in enumerate([tiny.PAD, tiny.BOS, tiny.EOS, "a", "b", "c"])}


def test_padding_and_what_is_not_graded_are_no_part_of_the_loss() -> None:
    torch.manual_seed(0)
    model = tiny.llama(IDS, layers=1, context=16)
    rows, targets = [[1, 3, 4], [1, 5]], [[tiny.UNGRADED, 4, 2], [5, 2]]
    together = tiny.graded_logits(model, tiny.padded(rows, IDS[tiny.PAD]), tiny.padded(targets, tiny.UNGRADED))
    assert together[1].tolist() == [4, 2, 5, 2]
    assert together[2].tolist() == [[False, True, True], [True, True, False]]
    alone = [
        tiny.graded_logits(model, torch.tensor([r]), torch.tensor([t]))[0] for r, t in zip(rows, targets, strict=True)
    ]
    torch.testing.assert_close(together[0], torch.cat(alone))


def test_steps_at_the_given_rate_learn_what_is_graded() -> None:
    torch.manual_seed(0)
    model = tiny.llama(IDS, layers=1, context=16)
    optimizer = tiny.optimizer(model, 1e-2)
    ids, targets = torch.tensor([[1, 3, 4, 5]]), torch.tensor([[3, 4, 5, 2]])

    def loss() -> torch.Tensor:
        logits, graded, _ = tiny.graded_logits(model, ids, targets)
        return F.cross_entropy(logits, graded)

    first = loss().item()
    tiny.descend(model, optimizer, loss(), 0.0)
    assert loss().item() == first  # the rate that is given is the one that counts
    for _ in range(30):
        tiny.descend(model, optimizer, loss(), 1e-2)
    assert loss().item() < first / 10


def test_the_tokenizer_has_a_token_a_word_and_begins_prompts_if_asked() -> None:
    assert tiny.tokenizer(IDS, context=16, bos=True)("a b").input_ids == [1, 3, 4]
    assert tiny.tokenizer(IDS, context=16, bos=False)("a b").input_ids == [3, 4]
