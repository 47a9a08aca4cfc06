"""Rows for training and analysis: whole requests, and shuffled batches."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError, ProbeError, RunDirectoryError
from sglang_probe.run import schema, weighting
from sglang_probe.run import tokens as positions
from sglang_probe.run.files import RunFiles

if TYPE_CHECKING:
    import torch


_PART = positions.PART


def activations(
    run: RunFiles,
    tokens: pd.DataFrame,
    hook_point: str,
    *,
    missing: Literal["raise", "nan"],
    first: int = 0,
    intervened: bool = False,
) -> torch.Tensor:
    """See `Run.activations`: `[positions, width]`.

    Args:
        tokens: `run.tokens_of` the request.

    Raises:
        RunDirectoryError: with `missing="raise"`, a position has no row.
    """
    import torch

    rid = tokens["rid"].iloc[0]
    tokens = tokens[(tokens["phase"] != schema.OVERSHOOT) & (tokens["position"] >= first)].sort_values("position")
    rows = tokens["source_row"].to_numpy()
    have = run.holds(hook_point, rows)
    if not intervened:
        have &= tokens["intervention"].isna().to_numpy()
    absent = tokens[~have]
    if len(absent) and missing == "raise":
        raise RunDirectoryError(
            f"{rid}: {len(absent)} of {len(tokens)} positions have no row of `{hook_point}`: {why_absent(absent)}",
            fix='pass missing="nan", or `intervened=True` for rows under interventions; a server begins a segment '
            "that reuses nothing older with `POST /probe/flush?cache=true`",
        )
    values = run.rows(hook_point, rows[have])
    if have.all():
        return values
    out = torch.full((len(rows), values.shape[1]), float("nan"), dtype=values.dtype)
    out[torch.from_numpy(have)] = values
    return out


def why_absent(absent: pd.DataFrame) -> str:
    """What became of positions without a row, in words: how many, and where the first is."""
    elsewhere = (absent["status"] == schema.REUSED) & ~absent["covered"]
    kinds = np.where(elsewhere, "reused from entries whose forward pass is not in this run", absent["status"])
    kinds = np.where(absent["source_row"] >= 0, "not selected (`rows` of the configuration)", kinds)
    kinds = np.where(absent["intervention"].notna(), "computed under an intervention", kinds)
    first = absent.groupby(kinds, sort=False)["position"].agg(["size", "min"])
    return "; ".join(f"{n} {kind} (from position {start})" for kind, n, start in first.itertuples(name=None))


def iter_batches(
    run: RunFiles,
    hook_point: str,
    *,
    batch_size: int,
    where: str | Callable[[pd.DataFrame], Any] | None,
    weight: str | Path | pd.DataFrame,
    shuffle: bool,
    seed: int,
    intervened: bool = False,
) -> Iterator[torch.Tensor]:
    """See `Run.iter_batches`: up to `batch_size` rows each, `[n, width]`.

    Raises:
        RunDirectoryError: the hook point was not captured, or `where`, the weights or `batch_size` cannot be used.
    """
    if batch_size < 1:
        raise RunDirectoryError(f"`batch_size` is {batch_size}", fix="give the rows of a batch, 1 or more")
    rng = np.random.default_rng(seed)
    parts = chosen_in_parts(run, hook_point, where=where, weight=weight, rng=rng, intervened=intervened)
    rows = np.concatenate([np.zeros(0, np.int64), *(tokens["row"].to_numpy() for tokens in parts)])
    if shuffle:
        rows = rng.permutation(rows)
    for i in range(0, len(rows), batch_size):
        yield run.rows(hook_point, rows[i : i + batch_size])


def chosen(
    run: RunFiles,
    hook_point: str,
    *,
    where: str | Callable[[pd.DataFrame], Any] | None,
    weight: str | Path | pd.DataFrame,
    rng: np.random.Generator,
    intervened: bool = False,
) -> pd.DataFrame:
    """The positions whose rows an epoch of `iter_batches` gives, in the run's order and as often as it gives them: the
    columns of `Run.tokens()`, `row` being the number of the row that is read. Positions under an intervention are left
    out unless `intervened`.

    Raises:
        RunDirectoryError: `where` or the weights cannot be used.
    """
    return pd.concat(
        list(chosen_in_parts(run, hook_point, where=where, weight=weight, rng=rng, intervened=intervened))
        or [positions.read_tokens(run, interrupted=False).iloc[:0]],
        ignore_index=True,
    )


def chosen_in_parts(
    run: RunFiles,
    hook_point: str,
    *,
    where: str | Callable[[pd.DataFrame], Any] | None,
    weight: str | Path | pd.DataFrame,
    rng: np.random.Generator,
    intervened: bool = False,
) -> Iterator[pd.DataFrame]:
    """What `chosen` gives, in its order, some requests at a time where `where` allows it (see `in_parts`).

    Raises:
        RunDirectoryError: as `chosen`.
    """
    column = {"unique": "row", "traffic": "source_row"}.get(weight) if isinstance(weight, str) else None
    weights = None if column else weighting.Weights.read(weight)
    copies = weighting.Copies(rng)
    for tokens in in_parts(run, where, intervened=intervened, error=RunDirectoryError):
        if column:
            rows = tokens[column]
            yield tokens.assign(row=rows)[run.holds(hook_point, rows.to_numpy())]
        else:
            assert weights is not None
            held = tokens[run.holds(hook_point, tokens["row"].to_numpy())]
            yield held.iloc[np.repeat(np.arange(len(held)), copies.of(weights.of(held)))]


def in_parts(
    run: RunFiles,
    where: str | Callable[[pd.DataFrame], Any] | None,
    *,
    intervened: bool = False,
    prepare: Callable[[pd.DataFrame], pd.DataFrame] = lambda tokens: tokens,
    name: str = "where",
    error: type[ProbeError] = ConfigError,
) -> Iterator[pd.DataFrame]:
    """Positions that a query chooses, without discarded steps, in the order and with the columns of `Run.tokens()`.
    Some requests at a time, if the query looks at each position by itself; else all of them in one frame.

    Args:
        intervened: those under an intervention too.
        prepare: adds columns to a frame, which the query may use.
        name, error: as of `queried`.
    """
    apart = where is None or (isinstance(where, str) and by_position(where))
    for tokens in positions.iter_tokens(run, _PART) if apart else [positions.read_tokens(run, interrupted=False)]:
        tokens = prepare(tokens[(tokens["phase"] != schema.OVERSHOOT) & (intervened | tokens["intervention"].isna())])
        yield tokens[where(tokens)] if callable(where) else queried(tokens, where, name=name, error=error)


_SYNTAX = (
    *(ast.Expression, ast.BoolOp, ast.boolop, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop),
    *(ast.Compare, ast.cmpop, ast.Name, ast.expr_context, ast.Constant, ast.List, ast.Tuple),
)
_IN_PANDAS = {"&": "and", "|": "or"}
"""As pandas reads them, which binds them less tightly than Python does."""
_METHODS = {"isna", "notna", "isin", "between", "abs"}
_OF_TEXT = {"startswith", "endswith", "contains", "len", "lower", "upper", "match", "fullmatch"}


def by_position(where: str) -> bool:
    """Whether a query surely asks of each position alone: it compares columns with constants and each other. One that
    uses a mean, a maximum, the frame's index, or all values of a column (`row in source_row`) does not."""
    try:
        words = [word[:2] for word in tokenize.generate_tokens(io.StringIO(where.strip()).readline)]
        tree = ast.parse(tokenize.untokenize((kind, _IN_PANDAS.get(text, text)) for kind, text in words), mode="eval")
    except (SyntaxError, tokenize.TokenError):
        return False
    return _by_position(tree)


def _by_position(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):  # of a method of a column, or of its `.str`
        called = node.func
        if not isinstance(called, ast.Attribute):
            return False
        text = isinstance(called.value, ast.Attribute) and called.value.attr == "str"
        column = called.value.value if text and isinstance(called.value, ast.Attribute) else called.value
        given = [*node.args, *(k.value for k in node.keywords)]
        known = called.attr in (_OF_TEXT if text else _METHODS)
        known &= called.attr != "isin" or all(map(_is_list_of_constants, given))
        return known and all(map(_by_position, [column, *given]))
    if isinstance(node, ast.Compare) and any(isinstance(o, ast.In | ast.NotIn) for o in node.ops):
        return all(map(_is_list_of_constants, node.comparators)) and _by_position(node.left)
    if isinstance(node, ast.List | ast.Tuple):
        return _is_list_of_constants(node)
    known_name = not isinstance(node, ast.Name) or node.id not in ("index", "ilevel_0")
    return isinstance(node, _SYNTAX) and known_name and all(map(_by_position, ast.iter_child_nodes(node)))


def _is_list_of_constants(node: ast.AST) -> bool:
    """pandas asks of all values of a column whether a value is among them, where a column stands for a list."""
    try:
        return isinstance(ast.literal_eval(node), list | tuple)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return False


def queried(
    tokens: pd.DataFrame, where: str | None, *, name: str = "where", error: type[ProbeError] = ConfigError
) -> pd.DataFrame:
    """The positions that a pandas query chooses; all of them without one.

    Args:
        name: of the key or option, for the message.
        error: what is raised if it cannot be used.
    """
    if where is None:
        return tokens
    try:
        mask = np.asarray(tokens.eval(where))
        if len(tokens) and (mask.dtype != bool or mask.shape != (len(tokens),)):
            raise ValueError("it is not true or false of each position")
        return tokens[mask.astype(bool)] if len(tokens) else tokens
    except Exception as e:  # pandas raises a kind of its own for each mistake
        columns = ", ".join(map(str, tokens.columns))
        raise error(f"`{name}` cannot be used: {e}", fix=f"the columns are {columns}") from e
