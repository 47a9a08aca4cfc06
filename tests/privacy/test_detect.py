"""Recall on planted text, class by class, and precision on code."""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.privacy.detect import KINDS, Found, Kind, entropy, find, luhn, mod97
from sglang_probe.privacy.rule import Withhold, found_in

PLANTED = {
    "email": ["ann.lee@example.org", "o'brien+list@mail.example.co.uk", "x_1%y@sub-domain.example.museum"],
    "phone": ["+49 30 901820", "+1 (415) 555-2671", "(020) 7946 0958", "415-555-2671", "+442079460958", "030 1234567"],
    "ip": ["203.0.113.7", "2001:db8::8a2e:370:7334", "10.20.30.40", "fe80::1ff:fe23:4567:890a"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR14 2004 1010 0505 0001 3M02 606"],
    "url_credentials": ["https://ann:s3cr3t@example.org/x", "postgres://app:pw@db.example.org:5432/main"],
    "key": [
        "sk-proj-" + "aB3dE5gH7jK9mN1pQ3sT5vW7",
        "ghp_" + "0123456789abcdefghijABCDEFGHIJ012345",
        "AKIA" + "IOSFODNN7EXAMPLE",
        "api_key = 'x9Kd03jfLq82hfPzmW74'",
        "Authorization: Bearer 7f3c9e1ab52d48c0a6e9d1f4b8237c55",
    ],
}
"""Reserved or made-up ones (RFC 2606, RFC 5737, RFC 3849, numbers for documentation)."""
FRAMES = ["Write to {} today.", "{}", "a,{};b", '"{}"', "first line\n{}\nlast line", "({})"]
FRAMES += ["\u201c{}\u201d", "\u00ab{}\u00bb", "\u2026{}\u2026", "is {}\u2013", "\u00a0{}\u00a0", "\u00e9{}\u00fc"]
FRAMES += ["\u90ae\u7bb1\u4e3a{}\u3002", "\u300c{}\u300d\u3067\u3059", "\U0001f642{}\U0001f642"]
"""Those of the second and third line are not ASCII: quotes, dashes, accents, Chinese, Japanese, pictures."""


def _found_in_tokens(text: str, kinds: list[Kind]) -> list[Found]:
    """As `find`, by the route that a run takes: tokens of a byte each. Places are those of characters again."""
    vocabulary = Vocabulary(tuple(bytes([i]) for i in range(256)), np.zeros(256, bool), np.zeros(256, bool))
    raw = text.encode()

    def characters(end: int) -> int:
        return len(raw[:end].decode())

    told = found_in(list(raw), vocabulary, Withhold(pii=kinds))
    return [Found(kind.removeprefix("pii:"), characters(a), characters(b)) for a, b, kind in told]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", [find, _found_in_tokens], ids=["text", "tokens"])
def test_everything_that_is_planted_is_found_whole(kind: str, route: Callable[..., list[Found]]) -> None:
    for value in PLANTED[kind]:
        for frame in FRAMES:
            if kind == "phone" and value.startswith("(") and frame == "({})":
                continue
            text = frame.format(value)
            start = text.index(value)
            pieces = [f for f in route(text, [kind]) if f.kind == kind]
            secret = value.split(" ")[-1].strip("'") if kind == "key" else value
            secret = value.rsplit("/", 1)[0] if kind == "url_credentials" else secret
            inside = text.index(secret, start)
            assert any(f.start <= inside and inside + len(secret) <= f.end for f in pieces), (text, pieces)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("4111 1111 1111 1112", "card"),  # Luhn
        ("1234567890123452", "card"),  # no scheme
        ("DE88 3704 0044 0532 0130 00", "iban"),  # mod 97
        ("999.0.113.7 and 1.2.3", "ip"),
        ("127.0.0.1 :: ::1 std::vector 12:30:45", "ip"),
        ("version 3.11.7-2026-11-21 and 0.123456789, id=12345678901", "phone"),
        ("@decorator a@b user@localhost", "email"),
        ("https://example.org/a:b@c http://host:80/", "url_credentials"),
        ("token = tokenizer.encode_plus_with_offsets", "key"),
        ("secret: some_module.some_function_name_v2", "key"),
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str, kind: str) -> None:
    assert find(text, [kind]) == []


def test_code_has_few_false_finds() -> None:
    """Of 150 files of Python's own library; finds were looked at once: addresses in authors' notes and examples of
    the documentation are there, and are what they look like."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py"))
    files = [f for f in files if "site-packages" not in f.parts and "test" not in f.parts]
    random.Random(0).shuffle(files)
    found: list[tuple[str, str]] = []
    characters = 0
    for file in files[:150]:
        text = file.read_text(encoding="utf-8", errors="replace")
        characters += len(text)
        found += [(f.kind, text[f.start : f.end]) for f in find(text)]
    wrong = [x for x in found if x[0] in ("card", "iban", "url_credentials", "key", "phone")]
    assert characters > 1_000_000
    assert len(wrong) <= 6, wrong


def test_sums_and_entropy_are_those_of_their_definitions() -> None:
    assert luhn("79927398713")
    assert not any(luhn(f"7992739871{n}") for n in "012456789")
    assert mod97("GB82WEST12345698765432")
    assert not mod97("GB83WEST12345698765432")
    assert entropy("abcd") == 2.0
    assert find("a@example.org b@example.org", ["email"]) == [Found("email", 0, 13), Found("email", 14, 27)]


def test_long_text_takes_no_more_than_its_length() -> None:
    """Patterns that go back over what they read would take minutes here."""
    for text in (
        "a" * 200_000,
        "1" * 200_000,
        "a." * 100_000,
        "1 " * 100_000,
        "::" * 50_000,
        "AB12" * 50_000,
        "a@" * 50_000,
    ):
        assert isinstance(find(text), list)


def test_blanks_after_a_word_for_a_secret_are_read_once() -> None:
    """60,000 of them took a minute when each was tried as the one that ends the blanks."""
    secret = "x9Kd03jfLq82hfPzmW74"
    for blank in ("\n", " ", "\t"):
        began = time.process_time()
        assert find("password" + blank * 60_000, ["key"]) == []
        assert [f.start for f in find(f"password{blank * 60_000}{secret}", ["key"])] == [60_008]
        assert time.process_time() - began < 5
    for between in (" ", "=", ": ", " = ", "\n:\n", "==", "' : '"):
        assert any(f.end == 8 + len(between + secret) for f in find(f"password{between}{secret}", ["key"])), between
    assert find(f"password{secret}x", ["key"]) == []


def test_presidio_adds_what_its_patterns_find() -> None:
    pytest.importorskip("presidio_analyzer")
    text = "ssn 856-45-6789 of a1, wallet 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"
    assert {f.kind for f in find(text, ["email"], presidio=True)} == {"presidio:us_ssn", "presidio:crypto"}
