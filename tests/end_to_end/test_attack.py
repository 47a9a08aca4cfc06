"""Proof by attack: random traffic on a real engine, the invariants, and the true owner of every KV slot.

Each safeguard has a negative control: with it disabled, something must notice. `docs/evidence/attack.md` says how to
run many configurations, and how to replay one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_probe.engine.releases import release
from tests.attack.latent import make_latent
from tests.attack.outcome import Outcome, attack
from tests.attack.plan import TIGHT
from tests.attack.windowed import make_windowed

pytestmark = pytest.mark.engine

CALM = {
    "cache": "on",
    "bypass": False,
    "pauses": False,
    "priorities": False,
    "refusals": False,
    "concurrency": 8,
    "samples": False,
    "hook_points": ["hook_embed"],
    "refused": None,
}
STREAM = ["hook_embed", "blocks.1.hook_resid_post"]
RETRACT = {"SGLANG_TEST_RETRACT": "1"}
NEWER_TREE = pytest.mark.skipif(not release().latent, reason="other caches are refused on that release")


def tight(env: dict[str, str] | None = None, *, refusals: bool = False, **server: Any) -> dict[str, Any]:
    """Fields of the attack's plan."""
    return {**CALM, "env": env or {}, "refusals": refusals, "server": {**TIGHT, **server}}


def assert_exact(outcome: Outcome) -> None:
    assert outcome.noticed == [], outcome.output
    assert outcome.oracle["compared"] > 20_000
    assert outcome.oracle["written"] > 2_000


def test_random_traffic_keeps_every_invariant_and_every_owner(tmp_path: Path) -> None:
    outcome = attack(tmp_path, 2, 100, plan=tight(RETRACT))
    assert_exact(outcome)
    assert outcome.counts["reused"] > 1000
    for reached in ("rebinds", "mixed", "retracted"):
        assert outcome.counts[reached] > 0


def windowed(folder: Path, env: dict[str, str] | None = None, **server: Any) -> dict[str, Any]:
    """The same with a model whose sliding layers keep their entries in a pool of their own."""
    return {**tight(env, **server), "model": str(make_windowed(folder / "model")), "hook_points": STREAM}


def renewed(folder: Path) -> dict[str, Any]:
    """Prefixes whose sliding entries are lost, that are computed again, and reused then."""
    served = {"renewed": True, "concurrency": 1, "waves": [60, 60]}
    return {**windowed(folder, max_total_tokens=8192, swa_full_tokens_ratio=0.05), **served}


@NEWER_TREE
def test_sliding_windows_in_a_pool_of_their_own(tmp_path: Path) -> None:
    outcome = attack(tmp_path, 2, 36, plan=renewed(tmp_path))
    assert outcome.noticed == [], outcome.output
    assert outcome.oracle["compared"] > 20_000
    assert outcome.counts["reused"] > 1000
    assert outcome.counts["rebinds"] > 0  # no prefix could be lost in one pool, which holds all of this traffic


@NEWER_TREE
@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [{}, {"env": RETRACT, "page_size": 16, "max_total_tokens": 4096}], ids=["tokens", "pages, retractions"]
)
def test_random_traffic_among_sliding_windows(plan: dict[str, Any], tmp_path: Path) -> None:
    outcome = attack(tmp_path, 3, 100, plan=windowed(tmp_path, **plan))
    assert outcome.noticed == [], outcome.output
    assert outcome.counts["retracted"] > 0 or not plan


@NEWER_TREE
@pytest.mark.slow
@pytest.mark.parametrize(
    "planted", ["reuse wrong slots", "exchange two owners", "ignore rebinds", "ignore what the tree took"]
)
def test_what_is_planted_among_sliding_windows_is_noticed(planted: str, tmp_path: Path) -> None:
    outcome = attack(tmp_path, 2, 36, sabotage=planted, plan=renewed(tmp_path))
    assert outcome.noticed, outcome.output


def latent(folder: Path, env: dict[str, str] | None = None, **server: Any) -> dict[str, Any]:
    """The same with a model whose cache holds one latent vector a position."""
    return {**tight(env, **server), "model": str(make_latent(folder / "model")), "hook_points": STREAM}


@NEWER_TREE
def test_latent_attention(tmp_path: Path) -> None:
    outcome = attack(tmp_path, 2, 60, plan=latent(tmp_path, RETRACT))
    assert outcome.noticed == [], outcome.output
    assert outcome.oracle["compared"] > 20_000
    assert outcome.counts["reused"] > 1000
    assert outcome.counts["retracted"] > 0


@NEWER_TREE
@pytest.mark.slow
@pytest.mark.parametrize("planted", ["reuse wrong slots", "exchange two owners", "ignore rebinds"])
def test_what_is_planted_under_latent_attention_is_noticed(planted: str, tmp_path: Path) -> None:
    outcome = attack(tmp_path, 2, 60, sabotage=planted, plan=latent(tmp_path))
    assert outcome.noticed, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 22))
def test_long_attack_in_a_random_configuration(seed: int, tmp_path: Path) -> None:
    assert_exact(attack(tmp_path, seed, 400))


PAGES = {"page_size": 16, "max_total_tokens": 4096}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sabotage", "plan"),
    [
        ("ignore rebinds", tight()),
        *(
            pytest.param(sabotage, plan, marks=SLOW)
            for sabotage, plan in {
                "ignore publications": tight(),
                "ignore the end of decode": tight(),
                "token keys in pages": tight(**PAGES),
                "keep the first owner": tight(),
                "one namespace": tight(),
                "hash the page alone": tight(),
                "forget too soon": tight(),
                "forget published names": tight(),
                "no attempts": tight(RETRACT),
                "decode rows as prefill": tight(),
                "count outputs": tight(),
                "ignore aborts": tight(max_running_requests=2),
                "ignore who had finished": tight(),
                "ignore the discard at the end": tight(),
                "ignore the discard at retraction": tight(RETRACT),
                "commit the newest first": tight(),
                "believe a refused prompt": tight(refusals=True),
                "write no rebinds": tight(),
                "write the first origin for all": tight(),
                "shift the rows": tight(),
                "tell no evictions": tight(),
            }.items()
        ),
    ],
)
def test_without_a_safeguard_the_attack_is_noticed(sabotage: str, plan: dict[str, Any], tmp_path: Path) -> None:
    outcome = attack(tmp_path, 2, 80, sabotage=sabotage, plan=plan)
    assert outcome.noticed, outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", ["ignore flushes", "take both insertions"])
def test_housekeeping_decides_nothing(sabotage: str, tmp_path: Path) -> None:
    """What a flush removes is never matched before it is inserted anew; publishing the same entries twice is one."""
    assert_exact(attack(tmp_path, 2, 80, sabotage=sabotage, plan=tight()))
