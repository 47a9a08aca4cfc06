"""Tables of parity with SAELens: readers, rows, evaluations. Needs SAELens (the extra `[sae]`).

    python bench/saelens.py RUN --hook-point blocks.2.hook_resid_post --sae models/sae-probe-text/seed-0 \\
        --evaluated 'sae-eval/summary.json=8 texts of 88 tokens in float32' ... --training training.txt \\
        > docs/evidence/saelens.md

`RUN` has the rows; `--sae` are folders that both open; `--evaluated` are summaries of
`sglang-probe sae eval ... --against saelens --gap ...`, each with what its rows are of; `--training` is what
`bench/sae_training.py` printed in the same session.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, LATENTS, K, CONTEXT = 4096, 1024, 16, 128
HEAD = """# Beside SAELens

Printed by `python bench/saelens.py` (its docstring has the arguments) with SAELens {sae_lens}, PyTorch {torch}.
`sglang-probe` trains with SAELens and needs it for nothing else: reading, judging and recalibrating are its own, and
these are the checks that both mean the same. They ask whether two programs agree, not how good an SAE is: some of the
rows below are those of its training. What is known of the SAEs that come along is in
[train a sparse autoencoder](../how-to/train-an-sae.md). No summary of the readers, the rows, the time and
the memory is committed: the tables are what was printed, once.
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--hook-point", required=True)
    parser.add_argument("--sae", type=Path, nargs="*", default=[])
    parser.add_argument("--evaluated", nargs="*", default=[], metavar="SUMMARY=WHAT")
    parser.add_argument("--training", type=Path)
    given = parser.parse_args()
    from sglang_probe.run.run import load_run

    run = load_run(given.run)
    x = run.rows(given.hook_point, np.arange(ROWS)).float()
    print(HEAD.format(sae_lens=version("sae-lens"), torch=torch.__version__))
    print("\n".join(_readers(x, given.sae)))
    print("\n".join(_rows(run, given.hook_point)))
    for path, _, what in (e.partition("=") for e in given.evaluated):
        print("\n".join(_evaluated(json.loads(Path(path).read_text(encoding="utf-8")), what)))
    if given.training is not None:
        print("## Time and memory of training\n")
        print("Printed by `python bench/sae_training.py`, which says what is measured: ratios of one session.\n")
        print(given.training.read_text(encoding="utf-8").strip())


def _readers(x: torch.Tensor, folders: list[Path]) -> Iterator[str]:
    """Ours against `SAE.load_from_disk`, of folders that SAELens saves and of those that we write."""
    from sae_lens import SAE as Theirs

    from sglang_probe.sae.folder import read_sae

    yield "## Readers\n"
    yield f"`read_sae` against `SAE.load_from_disk` on {len(x):,} recorded rows of width {x.shape[1]}, float32. The"
    yield f"first four are of {LATENTS:,} latents with weights drawn at random, saved by SAELens"
    yield "(`save_inference_model`); the others are ours, opened by both. Differences are the largest: of an"
    yield "activation relative to the largest, of a reconstructed number relative to the largest of the rows.\n"
    yield "| folder | saved as | latents that fire in one alone | L0 | activations | reconstructions |"
    yield "|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as scratch:
        made = {name: _saved(name, x, Path(scratch) / name) for name in ("standard", "jumprelu", "topk", "batchtopk")}
        for name, folder in [*made.items(), *((f"{p.parent.name}/{p.name}", p) for p in folders)]:
            ours, theirs = read_sae(folder), Theirs.load_from_disk(folder, dtype="float32")
            with torch.no_grad():
                z, back = theirs.encode(x), theirs(x)
            mine = ours.encode(x)
            differ = int(((mine > 0) != (z > 0)).sum())
            activations = float((mine - z).abs().max() / z.abs().max())
            rows = float((ours.reconstruct(x) - back).abs().max() / x.abs().max())
            fired = f"{differ} | {float((z > 0).sum(1).float().mean()):.1f}"
            yield f"| {name} | {theirs.cfg.architecture()} | {fired} | {activations:.1e} | {rows:.1e} |"
    yield ""


def _saved(architecture: str, x: torch.Tensor, folder: Path) -> Path:
    """An SAE of SAELens' with random weights on the scale of the rows."""
    import sae_lens

    name = {"standard": "Standard", "jumprelu": "JumpReLU", "topk": "TopK", "batchtopk": "BatchTopK"}[architecture]
    k: dict[str, Any] = {"k": K} if architecture in ("topk", "batchtopk") else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=x.shape[1], d_sae=LATENTS, device="cpu", **k)
    torch.manual_seed(0)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    with torch.no_grad():
        sae.W_dec.mul_(0.5 + torch.rand(LATENTS, 1))  # decoder norms are not 1
        sae.b_dec.copy_(x.mean(0))
        sae.b_enc.copy_(0.1 * torch.randn(LATENTS))
        pre = (x - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc
        if architecture == "jumprelu":  # one latent in 64 fires
            sae.threshold.copy_(pre.quantile(1 - 1 / 64, dim=0))
        if architecture == "batchtopk":
            norms = sae.W_dec.norm(dim=1)
            sae.topk_threshold.fill_(float((pre * norms).sort(dim=1).values[:, -K].mean()))
    sae.save_inference_model(folder)
    return folder


def _rows(run: Any, hook_point: str) -> Iterator[str]:
    """What `ActivationsStore` reads of an export, against the run's rows."""
    from sae_lens.training.activations_store import ActivationsStore

    from sglang_probe.export.saelens import export_saelens
    from sglang_probe.run.schema import OVERSHOOT

    with tempfile.TemporaryDirectory() as scratch:
        found = export_saelens(run, Path(scratch) / "out", hook_point, context=CONTEXT)
        places, batch = found.places, 8
        width = run.row_layout(hook_point)[0]
        nothing: Any = None  # the model of a store of cached rows is never asked
        store = ActivationsStore(
            model=nothing,
            dataset=None,
            streaming=False,
            hook_name=hook_point,
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=width,
            n_batches_in_buffer=2,
            total_training_tokens=1000,
            store_batch_size_prompts=batch,
            train_batch_size_tokens=CONTEXT,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(Path(scratch) / "out"),
        )
        equal = total = identical = 0
        tokens = run.tokens()
        tokens = tokens[(tokens["phase"] != OVERSHOOT) & tokens["intervention"].isna()]
        tokens = tokens.sort_values(["rid", "position"], kind="stable")
        sources, known = tokens["source_row"].to_numpy(), tokens["token_id"].to_numpy()
        for start in range(0, len(places) - batch + 1, batch):
            x, ids = store.get_raw_llm_batch()
            at = places[start : start + batch].ravel()
            theirs = x.reshape(-1, width)
            equal += int((theirs == run.rows(hook_point, sources[at]).float()).all(1).sum())
            assert ids is not None
            identical += int((ids.numpy() == known[at]).sum())
            total += len(theirs)
    yield "## Rows\n"
    yield f"`sglang-probe export saelens` with contexts of {CONTEXT}, read by `ActivationsStore`"
    yield "(`cached_activations_path`), against the rows of the run.\n"
    yield "| contexts | rows compared | equal to the bit | token ids that are the run's |"
    yield "|---|---|---|---|"
    yield f"| {len(places):,} | {total:,} | {equal:,} | {identical:,} |\n"


def _evaluated(told: dict[str, Any], what: str) -> Iterator[str]:
    """Ours beside `run_evals`, on rows of `what`: one SAE may be judged on several runs."""
    on = f"{told['sae']} on {what}" if what else told["sae"]
    yield f"## Evaluation: {on}, `{told['hook_point']}`, weights {told['weights_sha256'][:12]}\n"
    yield "| quantity | measured on | ours | theirs | difference | why |"
    yield "|---|---|---|---|---|---|"
    for row in told["against"]:
        numbers = f"{row['ours']:.6g} | {row['theirs']:.6g} | {row['difference']:+.1e}"
        yield f"| {row['quantity']} | {row['measured_on']} | {numbers} | {row['why']} |"
    yield ""


if __name__ == "__main__":
    main()
