"""`splice` and its control, and the entries of a library that name SAEs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError, LedgerError
from sglang_probe.run.run import Run
from sglang_probe.sae.folder import write_sae
from sglang_probe.sae.sae import SAE
from sglang_probe.steer_ask import Steer
from sglang_probe.steering import make, sae_entry, splice
from sglang_probe.steering.apply import bank_of, intervene
from sglang_probe.steering.library import Library, listed, write_sae_entry
from sglang_probe.steering.plan import Rows, rows_of
from sglang_probe.steering.reference import Close
from sglang_probe.steering.resolve import MOST_SPLICES, spec_of
from sglang_probe.steering.spec import Spec
from sglang_probe.steering.splice import directions, undecided
from tests.sae.small import hand_made, random_sae, rows
from tests.steering.conftest import MakeRun

POINT = "blocks.1.hook_resid_post"
DIGEST = "c" * 64


def library_of(folder: Path, *saes: SAE) -> Library:
    """Entries `sae-0`, `sae-1`, ... whose folders lie in the library."""
    for i, sae in enumerate(saes):
        write_sae(sae.with_metadata(hook_name=POINT, model_name="tiny"), folder / f"kept-{i}")
        told = {"hook_point": POINT, "model": "tiny", "model_weight_hash": DIGEST, "made_by": {"command": "test"}}
        write_sae_entry(folder, folder / f"kept-{i}", name=f"sae-{i}", **told)
    return Library.open(folder)


def asked(library: Library, *entries: dict) -> Spec:
    given = [Steer.model_validate({"vector": "sae-0", "op": "splice", **e}) for e in entries]
    found = spec_of(given, library, where="steer")
    assert found is not None
    return found


def spliced(x: torch.Tensor, library: Library, *entries: dict, starts: tuple[int, ...] = (0,)) -> torch.Tensor:
    """Rows of one sequence after the interventions, in forwards that begin at `starts`."""
    bank, numbers = bank_of(library.values())
    assert bank is not None
    parts = []
    for a, b in zip(starts, [*starts[1:], len(x)], strict=True):
        passes = rows_of([a], [b], [len(x)], [asked(library, *entries)], numbers).get(1, [])
        parts.append(intervene(x[a:b], passes, bank))
    return torch.cat(parts)


def test_a_row_becomes_its_reconstruction_or_a_fraction_of_the_way(tmp_path: Path) -> None:
    sae = hand_made()
    library = library_of(tmp_path, sae)
    x = torch.tensor([[3.0, 2.0], [0.5, -4.0], [1.0, 1.0]])
    assert torch.equal(spliced(x, library, {}), sae.reconstruct(x))
    half = spliced(x, library, {"strength": 0.5})
    assert torch.allclose(half, (x + sae.reconstruct(x)) / 2)
    only = spliced(x, library, {"prompt_window": [1, 2]})
    assert torch.equal(only[[0, 2]], x[[0, 2]])
    assert torch.equal(only[1], sae.reconstruct(x)[1])


def test_rows_of_one_forward_may_be_spliced_by_different_saes_beside_other_changes(tmp_path: Path) -> None:
    saes = [random_sae("jumprelu", seed=1), random_sae("topk", seed=2)]
    library = library_of(tmp_path, *saes)
    x = rows(4)
    windows: list[dict] = [{"prompt_window": [0, 2]}, {"vector": "sae-1", "prompt_window": [2, 4]}]
    out = spliced(x, library, *windows)
    assert torch.allclose(out, torch.cat([saes[0].reconstruct(x[:2]), saes[1].reconstruct(x[2:])]), atol=1e-5)
    twice = spliced(x, library, {}, {"vector": "sae-1"})  # each sees what the one before left
    assert torch.allclose(twice, saes[1].reconstruct(saes[0].reconstruct(x)), atol=1e-4)


def test_the_control_has_the_length_of_each_rows_error_and_another_direction(tmp_path: Path) -> None:
    sae = random_sae("jumprelu", width=64, latents=16)
    library = library_of(tmp_path, sae)
    x = rows(50, width=64)
    error = sae.reconstruct(x) - x
    control = spliced(x, library, {"random_error": 7}) - x
    assert torch.allclose(control.norm(dim=1), error.norm(dim=1), rtol=1e-4)
    assert float(torch.cosine_similarity(control, error).abs().max()) < 0.6
    assert not torch.allclose(control, spliced(x, library, {"random_error": 8}) - x)
    chunks = spliced(x, library, {"random_error": 7}, starts=(0, 1, 20, 33)) - x
    assert torch.allclose(chunks, control, atol=1e-4)


def test_directions_are_uniform_on_the_sphere_and_follow_from_seed_and_position_alone() -> None:
    seeds, positions = np.repeat(np.arange(40), 100), np.tile(np.arange(100), 40)
    u = directions(seeds, positions, 15).astype(np.float64)
    assert np.allclose(np.linalg.norm(u, axis=1), 1)
    assert np.abs(u.mean(0)).max() < 5 / np.sqrt(15 * len(u))
    assert np.abs(u.T @ u / len(u) - np.eye(15) / 15).max() < 5 * np.sqrt(2) / 15 / np.sqrt(len(u))
    assert np.abs(np.triu(u @ u.T, 1)).max() < 0.98  # none twice, however near seeds and positions are
    some = np.array([3999, 5, 777])
    assert np.array_equal(directions(seeds[some], positions[some], 15), u[some].astype(np.float32))


def test_the_control_is_another_history_and_a_splice_without_it_keeps_its_name(tmp_path: Path) -> None:
    library = library_of(tmp_path, hand_made())
    plain, seven, eight = asked(library, {}), asked(library, {"random_error": 7}), asked(library, {"random_error": 8})
    assert len({s.id for s in (plain, seven, eight)}) == len({s.history(5) for s in (plain, seven, eight)}) == 3
    assert "random_error" not in plain.to_json()[0]
    for given in (plain, seven):
        assert Spec.from_json(json.loads(json.dumps(given.to_json()))) == given


def test_a_request_splices_a_few_times_at_most(tmp_path: Path) -> None:
    library = library_of(tmp_path, hand_made())
    with pytest.raises(ConfigError, match=f"{MOST_SPLICES + 1} entries `splice`; a request may have {MOST_SPLICES}"):
        asked(library, *[{"exclude": [i]} for i in range(MOST_SPLICES + 1)])


@pytest.mark.parametrize(
    ("architecture", "x0", "near"),
    [("jumprelu", 3.0, True), ("jumprelu", 3.01, False), ("standard", 1.0, False), ("topk", 1.5, True)],
)
def test_rows_that_rounding_decides_are_known(architecture: str, x0: float, near: bool) -> None:
    """By hand: the first latent's threshold is 2 at `x0 - 1`; of topk the first two latents tie at 1.5."""
    x = torch.tensor([[x0, 0.0]])
    assert undecided(x, hand_made(architecture), 1e-6).tolist() == [near]


def test_rows_that_rounding_decides_end_what_is_compared(tmp_path: Path) -> None:
    library = library_of(tmp_path, hand_made("jumprelu"))
    bank, numbers = bank_of(library.values())
    assert bank is not None
    close = Close(lambda _layer: 1e-6)
    x = torch.tensor([[5.0, 0.5], [3.0, 0.5], [3.0, 0.5]])
    close.note(x, 1, rows_of([0], [3], [3], [asked(library, {"exclude": [1]})], numbers)[1], bank)
    assert (close.first, close.rows) == (2, 1)


def test_blocks_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = random_sae("jumprelu"), rows(20)
    whole = splice.reconstructed(x, sae)
    monkeypatch.setattr(splice, "_BLOCK", 3 * sae.latents)
    assert torch.allclose(splice.reconstructed(x, sae), whole, atol=1e-6)


def test_what_reaches_recorded_graphs_is_refused() -> None:
    from sglang_probe.engine.capture.graph_steering import GraphSteering
    from sglang_probe.steering.apply import SPLICE, Bank

    graph = GraphSteering(Bank.of([], saes=[hand_made()]), [1], passes=1, capacity=4, device="cpu")
    n = np.zeros(1, dtype=np.int64)
    one = Rows(row=n, vector=n, op=n + SPLICE, amount=n.astype("f4"), gated=n > 0, position=n, random=n - 1)
    with pytest.raises(LedgerError, match="spliced"):
        graph.load({1: [one]}, 4)


@pytest.mark.parametrize("where", ["inside", "beside", "elsewhere"])
def test_an_sae_stays_where_it_is_if_the_library_can_be_moved_with_it(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "all" / "library"
    at = {"inside": folder / "mine", "beside": tmp_path / "all" / "mine", "elsewhere": tmp_path / "far" / "mine"}[where]
    write_sae(random_sae("standard").with_metadata(hook_name=POINT), at)
    told = {"hook_point": POINT, "model": "tiny", "model_weight_hash": DIGEST, "made_by": {"command": "test"}}
    vector = write_sae_entry(folder, at, name="whole", **told)
    assert vector.card.sae is not None
    assert vector.card.sae.folder == {"inside": "mine", "beside": "../mine", "elsewhere": "whole"}[where]
    shutil.move(tmp_path / "all", tmp_path / "moved")
    shutil.rmtree(tmp_path / "far", ignore_errors=True)
    moved = Library.open(tmp_path / "moved" / "library")["whole"]
    assert moved.hash == vector.hash
    assert moved.sae is not None
    assert torch.equal(moved.sae.W_dec, random_sae("standard").W_dec)


def test_an_entry_is_replaced_if_asked_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "all" / "library"
    told = {"hook_point": POINT, "model": "tiny", "model_weight_hash": DIGEST, "made_by": {"command": "test"}}
    for seed in (1, 2):
        write_sae(random_sae("standard", seed=seed).with_metadata(hook_name=POINT), tmp_path / "far")
        found = write_sae_entry(folder, tmp_path / "far", name="whole", overwrite=seed == 2, **told)
        assert found.sae is not None
        assert torch.equal(found.sae.W_dec, random_sae("standard", seed=seed).W_dec)
    (folder / "whole" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_sae_entry(folder, tmp_path / "far", name="whole", overwrite=True, **told)
    assert (folder / "whole" / "notes.txt").exists()


def _changed(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        card = json.loads((folder / "sae-0.json").read_text())
        change(card)
        (folder / "sae-0.json").write_text(json.dumps(card))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "was changed or is gone": lambda f: write_sae(random_sae("standard", seed=5), f / "kept-0"),
    "cfg.json was changed": lambda f: (f / "kept-0" / "cfg.json").write_text("{}"),
    "which is not there": lambda f: shutil.rmtree(f / "kept-0"),
    "neither in the library nor beside it": _changed(lambda c: c["sae"].update(folder="../../elsewhere")),
    "is no folder relative": _changed(lambda c: c["sae"].update(folder="/etc")),
    "is no name of a file": _changed(lambda c: c["sae"].update(files={"../x": DIGEST})),
    "the card says 7": _changed(lambda c: c.update(width=7)),
    "an SAE has none": _changed(lambda c: c.update(norm=1.0)),
    "of kind `sae`, and of no other": _changed(lambda c: c.pop("sae")),
    "not of `blocks.2": _changed(lambda c: c.update(hook_point="blocks.2.hook_resid_post")),
}


@pytest.mark.parametrize("says", DAMAGE)
def test_an_sae_that_is_not_what_its_card_says_is_refused(says: str, tmp_path: Path) -> None:
    library_of(tmp_path / "a" / "library", random_sae("standard"))
    DAMAGE[says](tmp_path / "a" / "library")
    with pytest.raises(ConfigError, match=says):
        Library.open(tmp_path / "a" / "library")


def test_what_clients_may_know_of_an_sae_is_its_card(tmp_path: Path) -> None:
    (told,) = json.loads(json.dumps(listed(library_of(tmp_path, random_sae("standard")))))
    assert (told["kind"], told["norm"], told["sae"]["folder"]) == ("sae", None, "kept-0")
    assert str(tmp_path) not in json.dumps(told)
    bare = Library.open(tmp_path).without_saes()
    assert bare["sae-0"].sae is None
    assert json.loads(json.dumps(listed(bare))) == [told]
    assert bare.hash == Library.open(tmp_path).hash


def test_a_card_without_tensors_is_half_a_vector_unless_it_is_of_an_sae(tmp_path: Path) -> None:
    library_of(tmp_path, random_sae("standard"))
    (tmp_path / "other.json").write_text('{"kind": "direction"}')
    with pytest.raises(ConfigError, match="half of a vector"):
        Library.open(tmp_path)


def test_an_entry_says_whose_weights_its_sae_belongs_to(rows_run: MakeRun, tmp_path: Path) -> None:
    run: Run = rows_run("run", {"r": (3, 1)}, lambda _r, _p: torch.ones(6))
    write_sae(random_sae("standard").with_metadata(hook_name=POINT, model_name="tiny"), tmp_path / "sae")
    target = make.Target(tmp_path / "library", "whole")
    with pytest.raises(ConfigError, match="does not say from whose weights"):
        make.whole_sae(target, tmp_path / "sae")
    made = make.whole_sae(target, tmp_path / "sae", run)
    assert made.card.model == "tiny"
    assert made.card.model_weight_hash is not None
    assert made.card.norm is None
    with pytest.raises(ConfigError, match="has a vector `whole` already"):
        make.whole_sae(target, tmp_path / "sae", run)
    write_sae(random_sae("standard").with_metadata(hook_name=POINT, model_name="big"), tmp_path / "other")
    with pytest.raises(ConfigError, match="the SAE is of model `big`"):
        make.whole_sae(make.Target(tmp_path / "library", "other"), tmp_path / "other", run)


def test_a_copy_takes_the_place_of_its_own_and_of_nobody_elses(tmp_path: Path) -> None:
    library = tmp_path / "one" / "library"
    for name in ("mine", "theirs"):
        write_sae(random_sae("standard"), library / name)
    (library / "a.json").write_text(json.dumps({"name": "a", "sae": {"folder": "theirs"}}))
    (library / "mine.json").write_text(json.dumps({"name": "mine", "sae": {"folder": "mine"}}))
    write_sae(random_sae("standard", seed=7), tmp_path / "elsewhere" / "sae")
    with pytest.raises(ConfigError, match="is there already"):
        sae_entry.place(library, tmp_path / "elsewhere" / "sae", "theirs", overwrite=True)
    assert (library / "theirs" / "cfg.json").is_file()
    assert sae_entry.place(library, tmp_path / "elsewhere" / "sae", "mine", overwrite=True) == "mine"


def test_directions_of_many_rows_are_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in blocks, so that memory does not grow with the rows of a client's prompt."""
    library = library_of(tmp_path, random_sae("standard"))
    x = rows(12)
    whole = spliced(x, library, {"random_error": 3})
    drawn: list[int] = []
    real = splice.directions
    monkeypatch.setattr(splice, "_BLOCK", 16 * x.shape[1] * 5)
    monkeypatch.setattr(splice, "directions", lambda s, p, w: drawn.append(len(s)) or real(s, p, w))
    assert torch.allclose(spliced(x, library, {"random_error": 3}), whole, atol=1e-6)
    assert drawn == [5, 5, 2]
