"""Patterns of personal data and secrets in text, with the checks that tell them from other numbers.

`email`, `phone`, `ip`, `card` (Luhn), `iban` (mod 97), `url_credentials`, `key` (secrets by their prefix, and random
strings next to a word such as `token`). **Names, addresses, dates of birth and identity numbers are not found**: that
takes a model of language, and misses too. Patterns are of ASCII text, and every other character (a curly quote, a
Chinese one) is no part of a word: it ends what it stands beside. An address that is spelt out (`at`, `dot`) or cut by
markup is not found.

Sources: Luhn's sum, ISO/IEC 7812; IBAN, ISO 13616 (remainder 1 of division by 97); card prefixes and lengths, ISO/IEC
7812 issuer ranges of the large schemes.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from sglang_probe.errors import UnsupportedError

Kind = Literal["email", "phone", "ip", "card", "iban", "url_credentials", "key"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Found:
    """Characters `[start, end)` of a text."""

    kind: str
    start: int
    end: int


def find(text: str, kinds: Iterable[str] = KINDS, *, presidio: bool = False) -> list[Found]:
    """What is found of these kinds, in the order of the text; pieces may overlap.

    Args:
        presidio: also ask the pattern recognisers of `presidio-analyzer` (the extra `pii`), under `presidio:` and their
            name; they need no model of language and find no names.

    Raises:
        UnsupportedError: presidio is not installed.
    """
    found = [piece for kind in dict.fromkeys(kinds) for piece in _FINDERS[kind](text)]
    if presidio:
        found += _presidio(text)
    return sorted(found, key=lambda f: (f.start, f.end, f.kind))


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812)."""
    total = 0
    for i, c in enumerate(reversed(digits)):
        n = int(c) * (1 + i % 2)
        total += n - 9 if n > 9 else n
    return total % 10 == 0


def mod97(iban: str) -> bool:
    """Whether an IBAN without spaces has the remainder 1 (ISO 13616)."""
    turned = iban[4:] + iban[:4]
    return int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def entropy(text: str) -> float:
    """Bits per character of the distribution of its characters."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_.+%-]{1,64}(?:'[A-Za-z0-9_.+%-]{1,64})?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])",
    re.ASCII,
)
_PHONE = re.compile(
    r"(?<![\w.+/=-])(?:"
    r"\+[1-9]\d{0,2}(?:[ .-]?\(?0?\d{1,4}\)?){1,5}"  # international
    r"|\(0?\d{2,4}\)[ .-]?\d{3,4}[ .-]?\d{3,4}"  # (area) number
    r"|\d{3}([ .-])\d{3}\1\d{4}"  # 555 123 4567
    r"|0\d{2,4}[ /-]\d{3,4}(?:[ -]?\d{2,4}){0,2}"  # 030 1234567
    r")(?![\w=-]|\.\d)",
    re.ASCII,
)
_IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)", re.ASCII)
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])", re.ASCII)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])", re.ASCII)
_SCHEME = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2[2-7]\d{14}|3[47]\d{13}|3[068]\d{12}|6(?:011|5\d\d)\d{12}|35\d{14}",
    re.ASCII,
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII)
_USERINFO = re.compile(
    r"\b[a-zA-Z][a-zA-Z0-9+.-]{1,20}://[^\s/@:'\"<>]{0,128}:[^\s/@'\"<>]{1,256}@[^\s/'\"<>]{1,255}", re.ASCII
)
_PREFIXED = re.compile(
    r"(?<![\w-])(?:"
    r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,200}|gh[opsur]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{50,255}"
    r"|hf_[A-Za-z0-9]{30,64}|glpat-[A-Za-z0-9_-]{20,64}|xox[abprs]-[A-Za-z0-9-]{10,200}|A[KS]IA[0-9A-Z]{16}"
    r"|AIza[A-Za-z0-9_-]{35}|eyJ[A-Za-z0-9_-]{8,2000}\.eyJ[A-Za-z0-9_-]{8,4000}\.[A-Za-z0-9_-]{8,1000}"
    r")(?![\w-])",
    re.ASCII,
)
_PEM = re.compile(
    r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----[A-Za-z0-9+/=\s]{32,8000}?-----END (?:[A-Z]+ )?PRIVATE KEY-----",
    re.ASCII,
)
_NAMED = re.compile(
    r"(?i)(?:api[_-]?key|secret|token|passw(?:or)?d|pwd|bearer|authorization|credential)[A-Za-z_-]{0,20}[\"']?"
    r"(?:\s*+[:=]\s*+|\s++)"  # possessive: blanks are read once, and not again for every place where they could end
    r"[\"']?([A-Za-z0-9+/_=.~-]{16,512})",
    re.ASCII,
)
_LEAST_BITS = 3.5
"""Of a string next to a word for a secret: names of variables and paths have less."""


def _emails(text: str) -> Iterator[Found]:
    for m in _EMAIL.finditer(text):
        local = m[0].split("@")[0]
        if not local.startswith(".") and not local.endswith(".") and ".." not in local:
            yield Found("email", *m.span())


def _phones(text: str) -> Iterator[Found]:
    for m in _PHONE.finditer(text):
        digits = re.sub(r"\D", "", m[0])
        if 7 <= len(digits) <= 15 and len(set(digits)) > 2:
            yield Found("phone", *m.span())


def _ips(text: str) -> Iterator[Found]:
    for pattern in (_IP4, _IP6):
        for m in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(m[0])
            except ValueError:
                continue
            if not (address.is_unspecified or address.is_loopback):  # of nobody
                yield Found("ip", *m.span())


def _cards(text: str) -> Iterator[Found]:
    for m in _CARD.finditer(text):
        digits = re.sub(r"\D", "", m[0])
        if _SCHEME.fullmatch(digits) and luhn(digits):
            yield Found("card", *m.span())


def _ibans(text: str) -> Iterator[Found]:
    for m in _IBAN.finditer(text):
        # The pattern may have run into the next word: the longest beginning that holds is meant.
        for end in range(m.end(), m.start() + 14, -1):
            plain = text[m.start() : end].replace(" ", "")
            if text[end - 1] != " " and 15 <= len(plain) <= 34 and mod97(plain):
                yield Found("iban", m.start(), end)
                break


def _urls(text: str) -> Iterator[Found]:
    for m in _USERINFO.finditer(text):
        yield Found("url_credentials", *m.span())


def _keys(text: str) -> Iterator[Found]:
    for pattern in (_PREFIXED, _PEM):
        for m in pattern.finditer(text):
            yield Found("key", *m.span())
    for m in _NAMED.finditer(text):
        value = m[1]
        mixed = any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
        if mixed and entropy(value) >= _LEAST_BITS and not re.fullmatch(r"[A-Za-z]+(?:[_.-][A-Za-z0-9]+)*", value):
            yield Found("key", *m.span(1))


_FINDERS: dict[str, Callable[[str], Iterator[Found]]] = {
    "email": _emails,
    "phone": _phones,
    "ip": _ips,
    "card": _cards,
    "iban": _ibans,
    "url_credentials": _urls,
    "key": _keys,
}


def _presidio(text: str) -> list[Found]:
    try:
        from presidio_analyzer.predefined_recognizers import CreditCardRecognizer, CryptoRecognizer, UsSsnRecognizer
    except ImportError as e:
        raise UnsupportedError("presidio is not installed", fix="pip install 'sglang-probe[pii]'") from e
    recognizers = (CreditCardRecognizer(), CryptoRecognizer(), UsSsnRecognizer())
    results = [r for one in recognizers for r in one.analyze(text, one.supported_entities, None)]
    return [Found(f"presidio:{r.entity_type.lower()}", r.start, r.end) for r in results]
