"""Each axis gives the classes that its definition says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sglang_probe.axes.axes import AXES, make_axis
from sglang_probe.axes.axis import Axis, Sources
from sglang_probe.axes.batch import Batch
from sglang_probe.axes.frequency import Frequency
from sglang_probe.axes.phase import Phase
from sglang_probe.axes.position import Depth, Position, bins_of
from sglang_probe.axes.repeat import Repeat, _HashSet
from sglang_probe.axes.segment import Labelled, Segment
from sglang_probe.errors import ConfigError
from tests.axes.conftest import DECODE, NONE, PREFILL, RECOMPUTE

Make = Callable[..., Batch]
Classes = Callable[[Axis, Batch], list[str]]


def test_segments_are_painted_and_the_rest_is_generated_or_unknown(make_batch: Make, classes: Classes) -> None:
    batch = make_batch(
        [1, 2, 3, 4], [5, 6], prompt_len=[3, -1], painted={"segment": [(0, 1, 0), (1, 2, 1)]}
    )  # position 2 is a prompt token that no segment names
    assert classes(Segment(("system", "user")), batch) == [
        "system",
        "user",
        "unknown",
        "generated",
        "unknown",
        "unknown",
    ]


def test_a_label_of_the_users_own_covers_what_it_covers(make_batch: Make, classes: Classes) -> None:
    batch = make_batch([1, 2, 3], painted={"entity": [(1, 2, 0)]})
    assert classes(Labelled("entity", ("person",)), batch) == ["other", "person", "other"]


def test_positions_fall_into_bins_that_double(make_batch: Make, classes: Classes) -> None:
    found = classes(Position(), make_batch(list(range(70)), [1, 2]))
    expected = ["0"] + ["1–15"] * 15 + ["16–31"] * 16 + ["32–63"] * 32 + ["64–127"] * 6
    assert found == [*expected, "0", "1–15"]


def test_bins_are_the_same_beyond_the_table() -> None:
    far = np.array([5, 131_071, 131_072, 1 << 20, 1 << 21, 1 << 30])
    names = [Position().classes[i] for i in bins_of(far)]
    assert names == ["1–15", "65,536–131,071", "131,072–262,143", "1,048,576–2,097,151", "2,097,152 on", "2,097,152 on"]


def test_positions_go_on_where_a_segment_of_a_recording_takes_a_request_over(
    make_batch: Make, classes: Classes
) -> None:
    assert classes(Position(), make_batch([1, 2], begin=[15])) == ["1–15", "16–31"]


def test_depth_counts_generated_tokens_from_zero(make_batch: Make, classes: Classes) -> None:
    assert classes(Depth(), make_batch([1, 2, 3, 4], prompt_len=[2])) == ["prompt", "prompt", "0", "1–15"]
    assert classes(Depth(), make_batch([1], prompt_len=[-1])) == ["unknown"]


def test_phase_is_the_ledgers_and_else_what_computing_would_have_been(make_batch: Make, classes: Classes) -> None:
    spans = [(1, NONE), (1, PREFILL), (1, RECOMPUTE), (1, DECODE), (1, NONE), (1, NONE)]
    batch = make_batch([1, 2, 3, 4, 5], [6], prompt_len=[3, -1], spans=spans)
    assert classes(Phase(), batch) == ["prefill", "prefill", "recompute", "decode", "decode", "unknown"]


def test_frequency_ranks_tokens_over_the_whole_workload(make_batch: Make) -> None:
    axis, often, rare = Frequency(), list(range(10)) * 3, [100] * 2 + [200, -1]
    for ids in (often, rare):
        axis.observe(make_batch(ids))
    axis.begin()
    assert {axis.classes[i] for i in axis.labels(make_batch(often))} == {"10 most frequent"}
    assert [axis.classes[i] for i in axis.labels(make_batch(rare))] == ["rank 11–100"] * 2 + ["once", "unknown"]


def test_repeat_is_an_eight_gram_seen_earlier_in_any_request(make_batch: Make) -> None:
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, 2, n).tolist() for n in (40, 3, 90, 8, 60, 60)]
    seen: set[tuple[int, ...]] = set()
    expected = []
    for ids in requests:
        for p in range(len(ids)):
            gram = tuple(ids[p - 7 : p + 1])
            expected.append("start" if p < 7 else "repeat" if gram in seen else "new")
            seen |= {gram} if p >= 7 else set()
    axis = Repeat()
    for _ in range(2):  # a second pass begins anew
        axis.begin()
        found = [axis.labels(make_batch(*batch)) for batch in (requests[:2], requests[2:5], requests[5:])]
        assert [axis.classes[i] for i in np.concatenate(found)] == expected
    assert expected.count("new") > 20
    assert expected.count("repeat") > 20


def test_an_eight_gram_with_an_unknown_token_is_unknown(make_batch: Make, classes: Classes) -> None:
    found = classes(Repeat(), make_batch([*range(8), -1, *range(8)]))
    assert found == ["start"] * 7 + ["new"] + ["unknown"] * 8 + ["repeat"]


def test_the_set_of_hashes_remembers_over_many_additions() -> None:
    rng, found, known = np.random.default_rng(1), _HashSet(), set()
    for n in (5, 0, 100, 1, 300, 7, 7, 50):
        hashes = rng.integers(0, 200, n).astype(np.uint64)
        expected = []
        for h in hashes.tolist():
            expected.append(h in known)
            known.add(h)
        assert found.add(hashes).tolist() == expected


def shouting(batch: Batch) -> tuple[np.ndarray, list[str]]:
    return (batch.ids > 2).astype(int), ["quiet", "loud"]


def wrong(batch: Batch) -> tuple[list[int], list[str]]:
    return [0], []


def later(batch: Batch) -> tuple[np.ndarray, list[str]]:
    return np.zeros(len(batch), dtype=int), [f"batch of {len(batch)}"]


later.needs_ids = False


def test_a_function_of_the_users_own_is_an_axis(make_batch: Make, classes: Classes) -> None:
    axis = make_axis(f"{__name__}:shouting", Sources())
    assert (axis.name, axis.needs_ids) == ("shouting", True)
    assert classes(axis, make_batch([1, 3])) == ["quiet", "loud"]


def test_a_function_may_find_new_classes_later(make_batch: Make) -> None:
    axis = make_axis(f"{__name__}:later", Sources())
    assert not axis.needs_ids
    assert axis.labels(make_batch([1, 2])).tolist() == [0, 0]
    assert axis.labels(make_batch([1])).tolist() == [1]
    assert axis.classes == ["batch of 2", "batch of 1"]


def test_a_function_that_returns_nonsense_is_refused(make_batch: Make) -> None:
    with pytest.raises(ConfigError, match="expected 2 class numbers below 0"):
        make_axis(f"{__name__}:wrong", Sources()).labels(make_batch([1, 2]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("segmant", "did you mean `segment`"),
        ("json:no_such_function", "no_such_function"),
        ("no_such_module:f", "no_such_module"),
        ("lexical", "tokenizer is not at hand"),
        ("year=~\\d", "tokenizer is not at hand"),
    ],
)
def test_an_axis_that_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_axis(spec, Sources(model=Path("no/such/folder")))


def test_an_axis_of_the_workload_goes_by_its_name() -> None:
    axis = make_axis("entity", Sources(labels={"entity": ("person",)}))
    assert axis.classes == ["person", "other"]
    assert set(AXES) == {"segment", "role", "lexical", "frequency", "repeat", "position", "phase", "depth"}
