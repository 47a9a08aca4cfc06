"""A sample of `tests.verify.mutations`: whatever is changed in a good run is noticed, or listed with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verify.good_run import make_good_run
from tests.verify.mutations import UNDECIDED, excused, survivors


@pytest.mark.parametrize("every", [39, pytest.param(13, marks=pytest.mark.slow)])
def test_every_change_is_noticed_or_listed_with_its_reason(every: int, tmp_path: Path) -> None:
    run, other = make_good_run(tmp_path / "a").path, make_good_run(tmp_path / "b", seed=1).path
    left, counts = survivors(run, other, tmp_path, every=every, offset=4)
    tried = sum(n for (_, what), n in counts.items() if what == "tried")
    assert tried > 1300 / every
    assert [f"{m.kind} {m.name}" for m in left if excused(m) is None] == []
    assert len(left) < tried / 4


def test_nothing_is_listed_without_a_reason() -> None:
    assert all(len(why) > 10 for why in UNDECIDED.values())
