"""A `transformers` model under interventions: exactly the planned rows, in the engine's order of sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from sglang_probe.steer_ask import Steer
from sglang_probe.steering.apply import Bank, Parts
from sglang_probe.steering.card import Card, MadeBy
from sglang_probe.steering.library import Vector
from sglang_probe.steering.plan import OPS, Rows, rows_of
from sglang_probe.steering.reference import Close, Vectors, changed, intervened
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import Spec

D, LAYERS, PROMPT, LENGTH = 32, 3, 5, 12
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def vector(name: str, layer: int, seed: int, **more: torch.Tensor) -> Vector:
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    card = Card(
        name=name,
        kind="feature" if more else "direction",
        hook_point=f"blocks.{layer}.hook_resid_post",
        width=D,
        model="tiny",
        model_weight_hash=None,
        norm=float(v.norm()),
        layer_mean_norm=2.0,
        made_by=MadeBy(command="test"),
        sha256=f"{seed:064x}",
    )
    return Vector(card, {"vector": v, **more})


FEATURE = {
    "encoder": torch.randn(D, generator=torch.Generator().manual_seed(9)) / 4,
    "encoder_bias": torch.tensor(0.1),
    "threshold": torch.tensor(0.05),
}
LIBRARY = {v.name: v for v in (vector("a", 0, 1), vector("b", 1, 2), vector("f", 1, 3, **FEATURE))}
VECTORS = Vectors.of(list(LIBRARY.values()))
assert VECTORS is not None


def spec(*entries: dict[str, Any]) -> Spec:
    found = spec_of([Steer.model_validate(e) for e in entries], LIBRARY, where="steer")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def rows(model: Any, asked: Spec | None, ids: torch.Tensor = IDS, **more: Any) -> list[torch.Tensor]:
    """The residual stream after each layer, `[T, D]` each."""
    found: list[torch.Tensor] = []
    under: Any = nullcontext() if asked is None else intervened(model, asked, PROMPT, VECTORS, **more)
    with under:
        handles = [
            m.register_forward_hook(lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
            for m in model.model.layers
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for h in handles:
            h.remove()
    return found


@pytest.mark.parametrize(
    ("entry", "positions"),
    [
        ({"phases": ["prefill"], "prompt_window": [-1, None]}, [4]),
        ({"phases": ["decode"]}, list(range(5, 12))),
        ({"phases": ["decode"], "generation_window": [2, 4]}, [6, 7]),
        ({"prompt_window": [1, 3], "generation_window": [3, None], "exclude": [2, 9]}, [1, 7, 8, 10, 11]),
    ],
)
def test_exactly_the_planned_rows_are_changed(model: Any, entry: dict[str, Any], positions: list[int]) -> None:
    plain, steered = rows(model, None), rows(model, spec({"vector": "a", "strength": 1.5, **entry}))
    a = LIBRARY["a"].vector
    expected = plain[0].clone()
    expected[positions] += 1.5 * a / a.norm()
    torch.testing.assert_close(steered[0], expected, rtol=0, atol=1e-6)
    others = [p for p in range(LENGTH) if p not in positions]
    assert torch.equal(steered[0][others], plain[0][others])
    # What comes before the first change keeps its bits in every layer; what comes after it attends to the change.
    onset = positions[0]
    for before, after in zip(plain, steered, strict=True):
        assert torch.equal(before[:onset], after[:onset])
    assert not torch.allclose(plain[-1][-1], steered[-1][-1], atol=1e-3)


OPERATIONS = [
    {"vector": "a", "op": "add", "strength": 2.0},
    {"vector": "a", "op": "project_out"},
    {"vector": "f", "op": "ablate_feature"},
    {"vector": "f", "op": "clamp", "strength": 1.0},
    {"vector": "b", "op": "cap", "strength": 0.1},
]


@pytest.mark.parametrize(
    "entries", [*([e] for e in OPERATIONS), OPERATIONS], ids=lambda e: "+".join(x["op"] for x in e)
)
def test_token_by_token_with_a_cache_gives_the_same_rows(model: Any, entries: Sequence[dict[str, Any]]) -> None:
    """As an engine does it: the prompt in two chunks, then one token at a time, each with the plan of its own forward.
    Written here with plain arithmetic hooks, and nothing of `intervened`."""
    asked = spec(*entries)
    whole = rows(model, asked)
    pieces: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    plan: dict[int, list[Rows]] = {}

    def hook(layer: int) -> Any:
        def after(_m: Any, _a: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            out = changed(x[0], plan[layer], VECTORS.bank, None) if layer in plan else x[0]
            pieces[layer].append(out)
            return (out[None], *output[1:]) if isinstance(output, tuple) else out[None]

        return after

    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(model.model.layers)]
    cache = None
    for start, end in [(0, 2), (2, 5), *((p, p + 1) for p in range(5, LENGTH))]:
        plan = rows_of([start], [end], [PROMPT], [asked], VECTORS.numbers)
        with torch.no_grad():
            cache = model(IDS[:, start:end], past_key_values=cache, use_cache=True).past_key_values
    for h in handles:
        h.remove()
    for layer in range(LAYERS):
        torch.testing.assert_close(torch.cat(pieces[layer]), whole[layer], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[-1], rows(model, None)[-1], atol=1e-3)


def test_nothing_is_left_in_the_model(model: Any) -> None:
    before = rows(model, None)
    rows(model, spec(*OPERATIONS))
    assert all(torch.equal(a, b) for a, b in zip(before, rows(model, None), strict=True))


def test_in_bf16_the_change_is_added_to_the_summand_that_the_engine_adds_it_to(model: Any) -> None:
    """`(residual + change) + mlp` and not `(residual + mlp) + change`: they differ in last bits, and nowhere else."""
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    layer = half.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, a: seen.update(residual=a[0][0])),
        layer.mlp.register_forward_hook(lambda _m, _a, out: seen.update(mlp=out[0])),
    ]
    steered = rows(half, spec({"vector": "a", "strength": 1.5}))[0]
    for h in handles:
        h.remove()
    a = LIBRARY["a"].vector
    change = (1.5 * a / a.norm()).to(torch.bfloat16)
    assert torch.equal(steered, (seen["residual"] + change) + seen["mlp"])
    assert not torch.equal(steered, (seen["residual"] + seen["mlp"]) + change)


def test_a_model_of_another_shape_gets_the_change_on_its_sum() -> None:
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    passes = rows_of([0], [4], [4], [spec({"vector": "a", "strength": 1.0})], VECTORS.numbers)[0]
    a = LIBRARY["a"].vector
    torch.testing.assert_close(changed(x, passes, VECTORS.bank, None), x + a / a.norm())


def test_what_is_lacking_is_named() -> None:
    few = Vectors.of([LIBRARY["a"]])
    assert few is not None
    assert few.lacks(spec({"vector": "a", "strength": 1.0})) is None
    assert few.lacks(spec({"vector": "a", "strength": 1.0}, {"vector": "b", "strength": 1.0})) == "b"
    assert Vectors.of([]) is None


def test_a_later_pass_is_at_the_edge_of_what_the_one_before_left() -> None:
    """`add` moves the row from 0 onto the threshold 1 of the feature, which the second pass reads."""
    bank = Bank.of([Parts(torch.eye(4)[0]), Parts(torch.eye(4)[1], encoder=torch.eye(4)[0], threshold=1.0)])
    n = torch.zeros(1, dtype=torch.int64).numpy()
    rest = {"row": n, "gated": n > 0, "position": n, "random": n - 1}
    add = Rows(vector=n + 1, op=n + OPS.index("add"), amount=(n + 1).astype("float32"), **rest)
    ablate = Rows(vector=n + 2, op=n + OPS.index("ablate_feature"), amount=(n + 1).astype("float32"), **rest)
    for passes, rows in (([add, ablate], 1), ([ablate], 0)):
        close = Close(lambda _layer: 1e-4)
        close.note(torch.zeros(1, 4) + 1e-3, 0, passes, bank)
        assert close.rows == 0
        close.note(torch.tensor([[1e-5, 0.0, 0.0, 1.0]]), 0, passes, bank)
        assert close.rows == rows


def test_rows_at_the_edge_of_a_feature_are_named() -> None:
    """Threshold 1 along the first axis: rows at 0.5, 1 - 1e-6, 1 + 1e-6 and 2, at a tolerance of 1e-4."""
    bank = Bank.of([Parts(torch.eye(4)[1], encoder=torch.eye(4)[0], threshold=1.0)])
    x = torch.zeros(4, 4)
    x[:, 0] = torch.tensor([0.5, 1 - 1e-6, 1 + 1e-6, 2.0])
    n = torch.arange(4).numpy()

    def near(op: str, *, gated: bool = False) -> list[int]:
        full = {"vector": 0 * n + 1, "op": 0 * n + OPS.index(op), "amount": (0 * n).astype("float32")}
        full |= {"position": n, "random": 0 * n - 1}
        close = Close(lambda _layer: 1e-4)
        close.note(x, 0, [Rows(row=n, gated=(0 * n + gated).astype(bool), **full)], bank)
        return [close.rows, -1 if close.first is None else close.first]

    assert near("clamp") == [2, 1]
    assert near("ablate_feature") == [2, 1]
    assert near("add") == [0, -1]
    assert near("add", gated=True) == [2, 1]
