"""Whether the question is in the prompt when the cache is compressed: query-visible and query-hidden protocols.

Query-visible: the question ends the prompt, sits in the observation window, and the whole prompt is a candidate for
eviction. Query-hidden: the context is compressed first, and the question is read from the compressed cache like the
answer. Rankings of methods depend on this more than on most parameters, so a study states it for every number.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.layer import Layer, Queries


class Protocol(StrEnum):
    """When the cache is compressed."""

    QUERY_VISIBLE = "query_visible"
    QUERY_HIDDEN = "query_hidden"


def under(protocol: Protocol, layer: Layer, *, context: int) -> Layer:
    """What a method sees of a layer under a protocol.

    Args:
        protocol: query-visible returns the layer unchanged.
        layer: captured with the question as the end of its prompt.
        context: number of positions before the question.

    Returns:
        Under the hidden protocol a layer whose prompt is the context. The question's queries, keys and values become
        the first rows of `future`; all but the last of them are not scored, because the last one predicts the first
        token of the answer. Lookahead queries are dropped: they were generated with the question in sight.

    Raises:
        ProbeError: the question fills the prompt, or the captured queries do not reach back to it.
    """
    if protocol is Protocol.QUERY_VISIBLE:
        return layer
    question = layer.length - context
    captured = layer.q_NHD.shape[-3]
    if not 0 < context < layer.length:
        raise ProbeError(f"a context of {context} leaves no question in a prompt of {layer.length} positions")
    if captured <= question:
        raise ProbeError(
            f"{captured} prompt queries were captured and the question alone has {question}",
            fix="capture queries of a longer window",
        )
    future: Queries = layer.require("future")
    split = captured - question
    v = layer.v_LGD
    return replace(
        layer,
        q_NHD=layer.q_NHD[..., :split, :, :],
        q_pre_NHD=None if layer.q_pre_NHD is None else layer.q_pre_NHD[..., :split, :, :],
        k_LGD=layer.k_LGD[..., :context, :, :],
        v_LGD=None if v is None else v[..., :context, :, :],
        lookahead={},
        needed_L=None if layer.needed_L is None else layer.needed_L[..., :context],
        future=Queries(
            q_THD=torch.cat([layer.q_NHD[..., split:, :, :], future.q_THD], -3),
            k_TGD=_behind(layer.k_LGD, future.k_TGD, context),
            v_TGD=None if v is None else _behind(v, future.v_TGD, context),
            skip=question - 1,
        ),
    )


def _behind(prompt: Tensor, generated: Tensor | None, context: int) -> Tensor | None:
    return None if generated is None else torch.cat([prompt[..., context:, :, :], generated], -3)
