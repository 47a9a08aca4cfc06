"""How far a row may be from what `transformers` computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.errors import UnsupportedError
from sglang_probe.paths import shipped
from sglang_probe.run.run import Run
from sglang_probe.verify import rounding
from sglang_probe.verify.check import Check
from sglang_probe.verify.reference import EXCUSED, TOLERANCE, UNDETERMINED, check_against_transformers, tolerance
from tests.rows_run import Text, write_run

MODEL = shipped("models/probe-text/checkpoint")
POINT = "blocks.3.hook_resid_post"


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_rounding_may_grow_with_the_root_of_the_depth_and_no_further(dtype: torch.dtype) -> None:
    base = TOLERANCE[dtype]
    for point in ("hook_embed", "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.3.attn.hook_q"):
        assert tolerance(point, dtype) == base
    assert tolerance("blocks.15.hook_resid_post", dtype) == pytest.approx(2 * base)
    assert tolerance("blocks.63.hook_resid_post", dtype) == pytest.approx(4 * base)


def test_after_a_hundred_layers_a_row_of_another_token_still_fails() -> None:
    """Two unrelated rows differ by about 1.4 times their length."""
    assert max(tolerance("blocks.99.hook_resid_post", dtype) for dtype in TOLERANCE) < 0.3


class Amplifier(torch.nn.Module):
    """A model of one layer, whose output is what an embedding differs from 1 by, a thousand times."""

    def __init__(self) -> None:
        super().__init__()

        class Layer(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return (x - 1) * 1000

        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Identity()
        self.model.layers = torch.nn.ModuleList([Layer()])

    def rows(self) -> dict[str, torch.Tensor]:
        x = torch.full((2, 64), 3.0, dtype=torch.bfloat16)
        x[1] = 1 + 2**-7  # the next number after 1: rounding decides what is left of it
        return {"blocks.0.hook_resid_post": self.model.layers[0](self.model.embed_tokens(x))}


def test_rows_that_rounding_decides_are_told_from_the_others() -> None:
    model = Amplifier()
    plain = model.rows()
    steady, decided = rounding.spread(model, model.rows)["blocks.0.hook_resid_post"]
    assert 0 < steady < 0.02
    assert decided > 0.5
    after = model.rows()  # the model is as it was
    assert torch.equal(after["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])


def test_a_model_with_layers_under_other_names_is_refused_with_a_sentence() -> None:
    with pytest.raises(UnsupportedError, match=r"a Linear, without `model.embed_tokens` and `model.layers`"):
        rounding.spread(torch.nn.Linear(1, 1), dict)


@pytest.fixture(scope="module")
def residual() -> tuple[Text, torch.Tensor]:
    """A request, and the residual stream of its positions by `transformers` in bf16."""
    from transformers import AutoModelForCausalLM

    text = Text(list(range(100, 150)), list(range(200, 212)))
    model = AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.bfloat16).eval()
    kept: list[torch.Tensor] = []
    handle = model.model.layers[3].register_forward_hook(
        lambda _module, _args, y: kept.append((y[0] if isinstance(y, tuple) else y).reshape(-1, 256))
    )
    with torch.no_grad():
        model(torch.tensor([text.ids]))
    handle.remove()
    return text, kept[0][:-1]


Compared = Callable[[torch.Tensor], Check]


@pytest.fixture
def compared(residual: tuple[Text, torch.Tensor], tmp_path: Path) -> Compared:
    """The check of a run with these rows."""

    def compare(x_ND: torch.Tensor) -> Check:
        run: Run = write_run(tmp_path / "run", {"r": residual[0]}, {POINT: {"r": x_ND}})
        return check_against_transformers(run, str(MODEL), requests=1)

    return compare


def rounds(monkeypatch: pytest.MonkeyPatch, moved: np.ndarray) -> None:
    """Say that rounding alone moves the rows so far."""
    monkeypatch.setattr(rounding, "spread", lambda _model, _rows: {POINT: moved})


@pytest.mark.parametrize("decides", [False, True])
def test_two_exchanged_rows_in_bf16_are_noticed_even_if_rounding_is_said_to_move_all(
    decides: bool, residual: tuple[Text, torch.Tensor], compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = residual[1].clone()
    x[[20, 41]] = x[[41, 20]]
    if decides:
        rounds(monkeypatch, np.full(len(x) + 1, 0.6 * tolerance(POINT, torch.bfloat16)))
    check = compared(x)
    assert check.violation is not None
    assert f"{POINT}: relative error" in check.violation


@pytest.mark.parametrize(("wrong", "holds"), [(3, True), (4, False), (61, False)])
def test_a_few_rows_may_be_left_out_and_no_more(
    wrong: int, holds: bool, residual: tuple[Text, torch.Tensor], compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = residual[1].clone()
    assert (wrong / len(x) <= UNDETERMINED) == holds
    x[:wrong] *= 1 + 2 * tolerance(POINT, torch.bfloat16)
    rounds(monkeypatch, np.full(len(x) + 1, tolerance(POINT, torch.bfloat16)))
    check = compared(x)
    assert EXCUSED > 2
    if holds:
        assert check.violation is None
        assert check.note is not None
        assert f"{wrong} rows were left out" in check.note
    else:
        assert check.violation is not None
        assert f"{POINT}: {wrong} of 61 rows are too far off, and rounding alone may do that" in check.violation


def test_the_models_own_rows_agree(residual: tuple[Text, torch.Tensor], compared: Compared) -> None:
    check = compared(residual[1])
    assert (check.violation, check.covered) == (None, 61)
