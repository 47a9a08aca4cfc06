"""Values of rows: which may be zero."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from sglang_probe.run.run import load_run
from sglang_probe.verify.rows import rows_are_possible
from tests.verify.good_run import RESID, make_good_run


def blank(run: Path, hook_point: str, row: int) -> None:
    file = run / "rows" / hook_point / "shard-00000.safetensors"
    tensors = load_file(file)
    tensors["rows"][row] = 0
    save_file(tensors, file)


def test_rows_of_a_token_that_is_embedded_as_zero_may_be_zero(tmp_path: Path) -> None:
    path = make_good_run(tmp_path).path
    blank(path, RESID, 3)
    alone = rows_are_possible(load_run(path))
    assert alone.violation is not None
    assert "row 3 of the file is zero" in alone.violation
    blank(path, "hook_embed", 3)
    assert rows_are_possible(load_run(path)).holds
    assert not rows_are_possible(load_run(path), proved=False).holds
    blank(path, RESID, 4)
    assert not rows_are_possible(load_run(path)).holds
