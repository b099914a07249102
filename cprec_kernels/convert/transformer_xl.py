"""Transformer-XL's AdaptiveEmbedding and ProjectedAdaptiveLogSoftmax, read from a state_dict.

Layouts as in pytorch/mem_transformer.py and pytorch/utils/proj_adaptive_softmax.py of kimiyoung/transformer-xl
(arXiv 1901.02860), and in models/transfo_xl of huggingface/transformers, which kept the names.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..nn.adaptive_layout import ClusteredLayout, matrix, take
from ..partition import Partition
from ._layouts import BlockLayout, Factors, block_layout, clustered_layout, numbered


def from_transformer_xl_embedding(state: Mapping[str, Tensor], prefix: str = "", *, scaled: bool = True) -> BlockLayout:
    """An AdaptiveEmbedding as a :class:`BlockEmbedding`: equal outputs up to rounding.

    Tables are ``emb_layers.i.weight`` (k_i, d_i), projections ``emb_projs.i`` (d, d_i). With ``div_val`` 1 there is one
    table for all words, and a projection only if it is narrower than the model: one cluster.

    Args:
        state: of the module, or of a model with the module under ``prefix``, e.g. "transformer.word_emb.".
        scaled: the module multiplies what it looked up by sqrt(d); so do the parameters then.

    Raises:
        ValueError: a key is missing, shapes do not fit together, dimensions that grow, more than 8 clusters.
    """
    what = "a Transformer-XL AdaptiveEmbedding"
    tables = [
        matrix(state, f"{prefix}emb_layers.{i}.weight", what)
        for i in range(max(1, numbered(state, prefix + "emb_layers.{}.weight")))
    ]
    projections = _projections(state, f"{prefix}emb_projs", tables, what)
    width = tables[0].shape[1] if projections[0] is None else projections[0].shape[1]
    factor = width**0.5 if scaled else 1.0
    # On the smaller of the two factors, which is also the one that optimizers do not treat as rows.
    return block_layout(
        [
            (table * factor, None) if projection is None else (table, projection * factor)
            for table, projection in zip(tables, projections, strict=True)
        ],
        width,
    )


def from_transformer_xl_softmax(
    state: Mapping[str, Tensor],
    prefix: str = "",
    *,
    cutoffs: Sequence[int] | None = None,
    parents: Literal["forward", "reversed"] | None = None,
) -> ClusteredLayout:
    """A ProjectedAdaptiveLogSoftmax as a :class:`ClusteredSoftmaxWithLoss`: equal log-probabilities up to rounding.

    Read are ``out_layers.i.weight`` and ``.bias``, ``cluster_weight`` and ``cluster_bias`` (the parent labels), and
    ``out_projs.i`` (d, d_i). Biases of all levels are kept.

    Args:
        state: of the module, or of a model with the module under ``prefix``, e.g. "crit.".
        cutoffs: first word of every cluster but the first. Needed for ``div_val`` 1, where one table holds all words;
            otherwise the tables say it.
        parents: which label belongs to which tail; it has to be said where there are several tails, since the parameters
            do not show it. "reversed" for kimiyoung/transformer-xl, whose tail i reads column -i, "forward" for
            huggingface/transformers, whose tail i reads column k_0 + i - 1.

    Raises:
        ValueError: a key is missing, shapes or cutoffs do not fit together, ``parents`` is needed, ranks that grow, more
            than 8 clusters.
    """
    what = "a Transformer-XL ProjectedAdaptiveLogSoftmax"
    count = max(1, numbered(state, prefix + "out_layers.{}.weight"))
    tables = [matrix(state, f"{prefix}out_layers.{i}.weight", what) for i in range(count)]
    biases = [take(state, f"{prefix}out_layers.{i}.bias", what) for i in range(count)]
    labels = state.get(f"{prefix}cluster_weight")
    num_tails = 0 if labels is None else labels.shape[0]
    if num_tails and count == 1:
        bounds = _bounds(cutoffs, tables[0].shape[0], num_tails)
        tables = [tables[0][lo:hi] for lo, hi in itertools.pairwise(bounds)]
        biases = [biases[0][lo:hi] for lo, hi in itertools.pairwise(bounds)]
    elif cutoffs is not None and list(cutoffs) != list(itertools.accumulate(len(table) for table in tables))[:-1]:
        raise ValueError(f"cutoffs are {list(cutoffs)}, but the tables of {what} hold {[len(t) for t in tables]} words")
    if len(tables) != num_tails + 1:
        raise ValueError(
            f"{what} has {len(tables)} tables and {num_tails} parent labels: one less than tables is needed"
        )
    if num_tails > 1 and parents not in ("forward", "reversed"):
        raise ValueError(
            "say which parent label belongs to which tail: parents='reversed' for a checkpoint of "
            "kimiyoung/transformer-xl, parents='forward' for one of huggingface/transformers"
        )
    projections = _projections(state, f"{prefix}out_projs", tables, what)
    head_bias = biases[0]
    if labels is not None:
        label_bias = take(state, f"{prefix}cluster_bias", what)
        if parents == "reversed":
            labels, label_bias = labels.flip(0), label_bias.flip(0)
        tables[0], head_bias = torch.cat([tables[0], labels]), torch.cat([head_bias, label_bias])
    width = tables[0].shape[1] if projections[0] is None else projections[0].shape[1]
    factors: Factors = list(zip(tables, projections, strict=True))
    return clustered_layout(factors, width, head_bias, biases[1:])


def _projections(state: Mapping[str, Tensor], name: str, tables: Sequence[Tensor], what: str) -> list[Tensor | None]:
    """Projections (d_i, d) of every table; None for all where none is stored (d_embed = d_model)."""
    if f"{name}.0" not in state:
        if len({table.shape[1] for table in tables}) > 1:
            raise ValueError(f"this is not the state_dict of {what}: it lacks '{name}.0'")
        return [None] * len(tables)
    return [matrix(state, f"{name}.{i}", what, table.shape[1]).T for i, table in enumerate(tables)]


def _bounds(cutoffs: Sequence[int] | None, num_items: int, num_tails: int) -> tuple[int, ...]:
    if cutoffs is None or len(cutoffs) != num_tails:
        raise ValueError(
            f"one table holds all {num_items} words (div_val 1) and there are {num_tails} parent labels: "
            f"pass the {num_tails} cutoffs that the model was trained with, got {cutoffs}"
        )
    return Partition(num_items, cutoffs, [1] * (num_tails + 1), 1).offsets
