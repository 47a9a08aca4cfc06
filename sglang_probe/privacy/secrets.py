"""What else of a run tells what is withheld: right answers, sampling parameters, refusals, the manifest."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from sglang_probe.axes.vocabulary import Vocabulary
from sglang_probe.privacy.detect import find
from sglang_probe.privacy.rule import Withhold, found_in

Array = np.ndarray[Any, Any]
_LEAST_KNOWN = 4
"""Characters of a text that is taken for a part of what is withheld: shorter ones occur everywhere."""
_SAID = "withheld"
"""In place of a message that quoted what is withheld."""


@dataclass(frozen=True)
class Secret:
    """What is withheld of a request, by which it is known in what else is said of it."""

    ids: frozenset[int]
    texts: tuple[str, ...]
    vocabulary: Vocabulary
    rule: Withhold

    def in_ids(self, ids: Sequence[int] | None) -> bool:
        """Whether a list of token ids holds one of them, or is itself text in which something is found."""
        if ids is None:
            return False
        return not self.ids.isdisjoint(ids) or bool(found_in(ids, self.vocabulary, self.rule))

    def in_value(self, value: Any) -> bool:
        """The same of a value as JSON has it: text, a number in a list, a key."""
        if isinstance(value, str):
            plain = value.replace("\\", "")  # of a regular expression
            known = len(plain.strip()) >= _LEAST_KNOWN and any(plain.strip() in t or t in plain for t in self.texts)
            return known or bool(find(plain, self.rule.pii, presidio=self.rule.presidio))
        if isinstance(value, dict):
            keys = any(self.in_value(k) or (k.isdecimal() and int(k) in self.ids) for k in value)
            return keys or any(self.in_value(v) for v in value.values())
        if isinstance(value, list):
            return self.in_ids([x for x in value if type(x) is int]) or any(self.in_value(v) for v in value)
        return False

    def left(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The sampling parameters that tell nothing of it; and `custom_params`, of which a run has what the probe was
        asked that changes rows: places and names of vectors."""
        return {k: v for k, v in values.items() if k == "custom_params" or not self.in_value(v)}


def secrets_of(
    requests: pd.DataFrame, own: Mapping[str, Array], vocabulary: Vocabulary, rule: Withhold
) -> dict[str, Secret]:
    """By request.

    Args:
        own: of each request, which positions hold a token that is withheld, `[P]`.
    """
    secrets = {}
    for r in requests.itertuples():
        ids = [] if r.prompt_ids is None else [*r.prompt_ids, *(() if r.output_ids is None else r.output_ids)]
        mine, texts = own[r.rid][: len(ids)], []
        for away, span in itertools.groupby(range(len(ids)), key=lambda p: bool(mine[p])):
            if away:
                pieces = (vocabulary.pieces[ids[p]] for p in span if 0 <= ids[p] < len(vocabulary))
                texts.append(b"".join(pieces).decode("utf-8", errors="replace").strip())
        known = frozenset(int(i) for i, away in zip(ids, mine, strict=True) if away and i >= 0)
        secrets[r.rid] = Secret(known, tuple(t for t in texts if len(t) >= _LEAST_KNOWN), vocabulary, rule)
    return secrets


def told_without(table: pa.Table, secrets: Mapping[str, Secret]) -> pa.Table:
    """`requests.parquet` without what its other columns tell: right answers, sampling parameters, refusals."""
    rids = table["rid"].to_pylist()
    for name in ("continuation_ids", "answer_ids", "sampling_params", "refusal"):
        if name not in table.column_names:
            continue
        cleaned: list[Any] = []
        for rid, value in zip(rids, table[name].to_pylist(), strict=True):
            secret = secrets[rid]
            if name == "sampling_params" and value is not None:
                cleaned.append(json.dumps(secret.left(json.loads(value))))
            elif name == "refusal":
                cleaned.append(_SAID if secret.in_value(value) else value)
            else:
                cleaned.append(None if secret.in_ids(value) else value)
        at = table.column_names.index(name)
        table = table.set_column(at, name, pa.array(cleaned, type=table.schema.field(name).type))
    return table


def manifest_without(manifest: Mapping[str, Any], secrets: Mapping[str, Secret]) -> dict[str, Any]:
    """The same of the manifest: sampling parameters of all requests, and refusals."""
    told = dict(manifest)
    if isinstance(told.get("sampling"), dict):
        for secret in secrets.values():
            told["sampling"] = secret.left(told["sampling"])
    if told.get("refused"):
        told["refused"] = {
            rid: _SAID if rid in secrets and secrets[rid].in_value(why) else why for rid, why in told["refused"].items()
        }
    return told
