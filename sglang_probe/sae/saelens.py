"""SAELens' own evaluation of a folder (`sae_lens.evals.run_evals`), as it stands, beside which ours can be put.

It takes a store of token batches and a hooked model, and knows neither recorded rows nor checkpoints that
TransformerLens has no name for. What it is given instead, and which parts of SAELens that leaves:

* `of_rows`: a store whose "tokens" are numbers of rows, and a model whose activations are those rows. All of
  `get_sparsity_and_variance_metrics` runs, on exactly the rows that ours is judged by.
* `of_texts`: the checkpoint in SAELens' own wrapper of Hugging Face models (`load_model.HookedProxyLM`), under the
  hook point's name. All of `run_evals` runs. Contexts come from us, of one length, in place of an `ActivationsStore`,
  which would cut a data set into contexts of its own.
* `of_texts(start=...)`: SAELens' replacement of rows and its losses, from a position on: what `sglang-probe sae gap`
  measures in the engine.

SAELens is imported inside functions of this file: its import takes ten seconds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.sae.train import require_sae_lens

if TYPE_CHECKING:
    import torch

_ROWS = 4096
_CONTEXTS = 4
_BLOCK = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def of_rows(folder: Path, x_ND: torch.Tensor) -> dict[str, float]:
    """What SAELens says of an SAE on rows: `explained_variance`, `explained_variance_legacy`, `mse`, `l0`, `l1`,
    `cossim`, `l2_ratio`, `relative_reconstruction_bias`, and `dead_share` (latents whose `feature_density` is 0).

    Args:
        x_ND: rows that are judged by; `legacy` depends on how many are given at a time, here 4,096.

    Raises:
        ConfigError: SAELens is not installed, or there are no rows.
    """
    if not len(x_ND):
        raise ConfigError("there are no rows to judge the SAE by")
    sae = _opened(folder)
    return _evaluated(sae, _Numbers(len(x_ND)), _Rows(x_ND), batches=-(-len(x_ND) // _ROWS), special=False, rows=True)


def of_texts(
    folder: Path, checkpoint: Path, hook_point: str, ids_TC: torch.Tensor, *, start: int | None = None
) -> dict[str, float]:
    """What SAELens says of an SAE on texts that run through the model, in float32 on the CPU: `ce_loss_without_sae`,
    `ce_loss_with_sae`, `ce_loss_with_ablation` (rows of zeros), `ce_loss_score` (what is recovered),
    `kl_div_with_sae`, `kl_div_with_ablation`, `kl_div_score`; and without `start` all that `of_rows` gives.

    Args:
        checkpoint: folder of the model.
        ids_TC: token ids, int64 `[texts, positions]`.
        start: replace rows from this position on only, and take losses of the predictions of tokens after it; None:
            SAELens' own evaluation, of every position that holds no special token.

    Raises:
        ConfigError: SAELens is not installed.
        UnsupportedError: `hook_point` is no `blocks.N.hook_resid_post`, or the model has no list of blocks.
    """
    sae = _opened(folder, hook_point)
    model = _Texts(checkpoint, hook_point, start)
    size = next(n for n in range(_CONTEXTS, 0, -1) if len(ids_TC) % n == 0)
    store = _Contexts(ids_TC, size)
    batches, whole = len(ids_TC) // size, start is None
    return _evaluated(sae, store, model, batches=batches, special=whole, rows=whole, losses=True)


def special_ids(checkpoint: Path) -> list[int]:
    """Tokens whose positions SAELens leaves out of its own evaluation."""
    from sae_lens.util import get_special_token_ids
    from transformers import AutoTokenizer

    return [int(i) for i in get_special_token_ids(AutoTokenizer.from_pretrained(checkpoint))]


def _opened(folder: Path, hook_point: str = "rows") -> Any:
    require_sae_lens("an evaluation by SAELens")
    os.environ.setdefault("WANDB_MODE", "disabled")
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, dtype="float32")  # as our reader does; products in bfloat16 are others
    sae.cfg.metadata.hook_name = hook_point  # which folders of others need not say
    return sae


def _evaluated(
    sae: Any, store: Any, model: Any, *, batches: int, special: bool, rows: bool, losses: bool = False
) -> dict[str, float]:
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    config = EvalConfig(
        batch_size_prompts=store.store_batch_size_prompts,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_kl=losses,
        compute_ce_loss=losses,
        compute_l2_norms=rows,
        compute_sparsity_metrics=rows,
        compute_variance_metrics=rows,
        compute_featurewise_density_statistics=rows,
    )
    found, features = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=special)
    numbers = {k: float(v) for name, group in found.items() if name != "token_stats" for k, v in group.items()}
    if rows:
        numbers["dead_share"] = sum(d == 0 for d in features["feature_density"]) / len(features["feature_density"])
    return numbers


class _Numbers:
    """A store whose tokens are numbers of rows, `[n, 1]`, from the first to the last."""

    context_size, store_batch_size_prompts = 1, _ROWS

    def __init__(self, rows: int) -> None:
        self._rows, self._at = rows, 0

    def get_batch_tokens(self, size: int) -> torch.Tensor:
        import torch

        first, self._at = self._at, min(self._at + size, self._rows)
        return torch.arange(first, self._at)[:, None]


class _Rows:
    """A model whose activations are given rows."""

    def __init__(self, x_ND: torch.Tensor) -> None:
        self._x_ND = x_ND

    def run_with_cache(self, numbers: torch.Tensor, *, names_filter: list[str], **_: Any) -> tuple[None, Any]:
        return None, {names_filter[0]: self._x_ND[numbers].float()}


class _Contexts:
    """A store of given contexts, which begins again when it is asked to."""

    def __init__(self, ids_TC: torch.Tensor, size: int) -> None:
        self._ids_TC, self._at = ids_TC, 0
        self.context_size, self.store_batch_size_prompts = int(ids_TC.shape[1]), size

    def get_batch_tokens(self, size: int) -> torch.Tensor:
        self._at += size
        return self._ids_TC[self._at - size : self._at]

    def reset_input_dataset(self) -> None:
        self._at = 0


class _Texts:
    """SAELens' wrapper of a Hugging Face model, whose block is called as the hook point is."""

    def __init__(self, checkpoint: Path, hook_point: str, start: int | None) -> None:
        import torch
        from sae_lens.load_model import HookedProxyLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._block, self._hook_point, self._start = _block_of(model, hook_point), hook_point, start
        self._model: Any = HookedProxyLM(model, AutoTokenizer.from_pretrained(checkpoint), hook_names=[self._block])

    @property
    def tokenizer(self) -> Any:
        """Whose special tokens are left out."""
        return self._model.tokenizer

    def __call__(self, tokens: torch.Tensor, **how: Any) -> Any:
        return self._cut(self._model(tokens, **how))

    def run_with_hooks(self, tokens: torch.Tensor, *, fwd_hooks: list[tuple[str, Any]], **how: Any) -> Any:
        hooks = [(self._block, self._from_start(hook)) for _, hook in fwd_hooks]
        return self._cut(self._model.run_with_hooks(tokens, fwd_hooks=hooks, **how))

    def run_with_cache(self, tokens: torch.Tensor, *, stop_at_layer: int, **_: Any) -> tuple[None, Mapping[str, Any]]:
        names = [self._block]
        _, cache = self._model.run_with_cache(tokens, names_filter=names, stop_at_layer=stop_at_layer)
        return None, {self._hook_point: cache[self._block]}

    def _from_start(self, replaced: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        import torch

        def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
            return (
                replaced(x, hook=hook)
                if not self._start
                else torch.cat([x[:, : self._start], replaced(x, hook=hook)[:, self._start :]], dim=1)
            )

        return hook

    def _cut(self, output: Any) -> Any:
        """Predictions of the tokens after the start, each with its loss."""
        logits, loss = output
        return (logits, loss) if self._start is None else (logits[:, self._start : -1], loss[:, self._start :])


def _block_of(model: Any, hook_point: str) -> str:
    """Name of the module whose output is the hook point.

    Raises:
        UnsupportedError: the hook point is another kind, or there is no such block.
    """
    from torch.nn import ModuleList

    found = _BLOCK.fullmatch(hook_point)
    blocks = [
        n for n, m in model.named_modules() if isinstance(m, ModuleList) and len(m) == model.config.num_hidden_layers
    ]
    if found is None or len(blocks) != 1 or int(found[1]) >= model.config.num_hidden_layers:
        raise UnsupportedError(
            f"SAELens cannot be shown `{hook_point}` of this model", fix="SAEs of `blocks.N.hook_resid_post` only"
        )
    return f"{blocks[0]}.{found[1]}"
