"""Names in the ledger: no id that a client may choose can spell another request's name."""

from __future__ import annotations

import random
import re
import string

import pytest

from sglang_probe.engine.live.names import Names, escaped

ALPHABET = ["~", "~", "~", "0", "1", "2", "u", "h", "k", "/", ".", "\n", "\x00", "é", "\ud800", "𝄞", " "]


def _read(name: str) -> tuple[str, int]:
    """Id and number that a name stands for, from left to right, as the table in `names.py` says."""
    rid, i = "", 0
    if name == "~0":
        return "", 0
    while i < len(name):
        if name[i] != "~":
            rid, i = rid + name[i], i + 1
        elif name[i + 1] == "~":
            rid, i = rid + "~", i + 2
        elif name[i + 1] == "u":
            rid, i = rid + chr(int(name[i + 2 : i + 6], 16)), i + 6
        else:
            assert re.fullmatch(r"~[1-9]\d*", name[i:])
            return rid, int(name[i + 1 :])
    return rid, 0


def _id(random_: random.Random) -> str:
    return "".join(random_.choices(ALPHABET, k=random_.choice([0, 1, 1, 2, 2, 3, 4, 7])))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_ids_clients_choose_a_name_is_of_one_request_and_says_which(seed: int) -> None:
    random_ = random.Random(seed)
    ids = [_id(random_) for _ in range(12)]
    held: list[str] = []  # running, or remembered by the lineage
    names = Names(lambda name: name in held)
    here: set[str] = set()
    before: set[str] = set()
    for _ in range(600):
        what = random_.random()
        if what < 0.03:
            carried = random_.sample(held, k=min(2, len(held)))
            names.new_segment(carried)
            before, here = here, set(carried)
        elif what < 0.3 and held:
            held.remove(random_.choice(held))
        else:
            # Sometimes a client spells a name that was made.
            rid = random_.choice([*ids, *held, *sorted(here), _id(random_)])
            name = names.name(rid)
            assert name not in here | before | set(held)
            if len(rid) <= 256:
                assert _read(name)[0] == rid
            name.encode()  # a file can hold it
            here.add(name)
            held.append(name)


def test_an_ordinary_id_is_its_own_name() -> None:
    for rid in ("a", "req-1", "cmpl-0a1b2c", "é 𝄞\n", "../../x", "0", "x" * 256):
        assert Names().name(rid) == rid


def test_long_ids_are_told_apart_and_cost_little() -> None:
    long, other = "x" * 1_000_000, "x" * 1_000_001
    assert escaped(long) != escaped(other)
    assert len(escaped(long)) < 300
    spelled = escaped(long)
    assert escaped(spelled) != spelled  # nor can anybody spell it


def test_an_id_that_comes_again_and_again_costs_no_more_each_time() -> None:
    looked_up: list[str] = []
    names = Names(lambda name: bool(looked_up.append(name)))
    for n in range(2000):
        if n % 500 == 0:
            names.new_segment(())
        names.name("same")
    assert len(looked_up) < 3 * 2000


def test_different_ids_have_different_names() -> None:
    random_ = random.Random(1)
    ids = {"".join(random_.choices("~01uh" + string.ascii_lowercase[:3], k=random_.randrange(7))) for _ in range(20000)}
    assert len({escaped(rid) for rid in ids}) == len(ids)
