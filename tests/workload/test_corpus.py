"""The functions of a corpus are cut out of it exactly."""

from __future__ import annotations

from sglang_probe.workload.corpus import Corpus, Document

FUNCTION = '''def double(value: int) -> int:
    """Return twice the value that was given."""
    return value + value  # no multiplication needed'''


def test_a_form_feed_does_not_shift_the_source_of_a_function() -> None:
    corpus = Corpus("c", (Document("a.py", f"import os\n\f\n{FUNCTION}\n"),))
    assert [f.source for f in corpus.functions] == [FUNCTION]


def test_a_file_that_is_no_python_has_no_functions() -> None:
    assert Corpus("c", (Document("a.py", "def ("), Document("b.py", f"{FUNCTION}\n\0"))).functions == ()
