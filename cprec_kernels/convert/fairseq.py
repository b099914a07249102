"""fairseq's AdaptiveInput and AdaptiveSoftmax, read from a state_dict.

Layouts as in fairseq/modules/adaptive_input.py and adaptive_softmax.py of facebookresearch/fairseq (arXiv 1809.10853).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..nn.adaptive_layout import ClusteredLayout, matrix
from ._layouts import BlockLayout, block_layout, clustered_layout, numbered


def from_fairseq_adaptive_input(state: Mapping[str, Tensor], prefix: str = "") -> BlockLayout:
    """An AdaptiveInput as a :class:`BlockEmbedding`: equal outputs, up to rounding where a band has no lower rank.

    Bands are ``embeddings.i.0.weight`` (k_i, d_i) and ``embeddings.i.1.weight`` (d, d_i). fairseq's words keep their ids.
    Its padding word (1 by default) is an ordinary row here; give ``padding_idx=1`` to
    ``BlockEmbedding.from_factors(*layout, padding_idx=1)`` to keep it from getting gradients.

    Args:
        state: of the module, or of a model with the module under ``prefix``, e.g. "decoder.embed_tokens.".

    Raises:
        ValueError: a key is missing, shapes do not fit together, dimensions that grow, more than 8 bands.
    """
    what = "a fairseq AdaptiveInput"
    bands = max(1, numbered(state, prefix + "embeddings.{}.0.weight"))
    factors = []
    for i in range(bands):
        table = matrix(state, f"{prefix}embeddings.{i}.0.weight", what)
        factors.append((table, matrix(state, f"{prefix}embeddings.{i}.1.weight", what, table.shape[1]).T))
    width = factors[0][1].shape[1]
    _same_width([projection.shape[1] for _, projection in factors], what)
    return block_layout(factors, width)


def from_fairseq_adaptive_softmax(
    state: Mapping[str, Tensor], prefix: str = "", *, tie_proj: bool | None = None
) -> ClusteredLayout:
    """An AdaptiveSoftmax as a :class:`ClusteredSoftmaxWithLoss`: equal log-probabilities up to rounding.

    Both kinds are read: the plain one (``head.weight``) and the one tied to an AdaptiveInput (``head.word_proj``,
    ``head.class_proj``), whose weights come as copies; :class:`TiedBlocks` shares them again. Tails are ``tail.i.0.weight``
    and ``tail.i.2.weight``; the dropout between them has no parameters.

    Args:
        state: of the module, or of a model with the module under ``prefix``, e.g. "decoder.adaptive_softmax.".
        tie_proj: whether tails use the input's projections (``--tie-adaptive-proj``), which are stored transposed. Seen
            from the shapes, except for a tail as wide as the model, for which it has to be said.

    Raises:
        ValueError: a key is missing, shapes do not fit together, ranks that grow, more than 8 clusters; a checkpoint
            without ``version``, which fairseq refuses too: its parent labels overlap with the last item of the head.
    """
    what = "a fairseq AdaptiveSoftmax"
    if f"{prefix}version" not in state:
        raise ValueError(
            f"this is not the state_dict of {what} that can be read: it lacks '{prefix}version'. Without it, it is of an "
            "early fairseq, whose tails read the label before their own"
        )
    tails = numbered(state, prefix + "tail.{}.0.weight")
    if f"{prefix}head.weight" in state:
        head = matrix(state, f"{prefix}head.weight", what)
    else:
        labels = matrix(state, f"{prefix}head.class_proj.weight", what)
        head = torch.cat([_tied_words(state, prefix, labels.shape[1], what), labels])
        if labels.shape[0] != tails:
            raise ValueError(f"'{prefix}head.class_proj.weight' has {labels.shape[0]} labels for {tails} tails")
    if head.shape[0] <= tails:
        raise ValueError(f"the head of {what} under {prefix!r} has {head.shape[0]} rows for {tails} tails")
    width = head.shape[1]
    factors: list[tuple[Tensor, Tensor | None]] = [(head, None)]
    for i in range(tails):
        weight = matrix(state, f"{prefix}tail.{i}.2.weight", what)
        projection = matrix(state, f"{prefix}tail.{i}.0.weight", what)
        rank = weight.shape[1]
        transposed = tie_proj
        if rank != width:
            transposed = projection.shape == (width, rank)
        elif transposed is None:
            raise ValueError(
                f"'{prefix}tail.{i}.0.weight' is square: say tie_proj=True if the projections were tied to the input's "
                "(--tie-adaptive-proj), False otherwise"
            )
        projection = projection.T if transposed else projection
        if projection.shape != (rank, width):
            raise ValueError(
                f"'{prefix}tail.{i}.0.weight' must be {(rank, width)} or its transpose, got {tuple(projection.shape)}"
            )
        factors.append((weight, projection))
    return clustered_layout(factors, width)


def _tied_words(state: Mapping[str, Tensor], prefix: str, width: int, what: str) -> Tensor:
    """Rows of the head's items (k_0, d) where they are tied to the input's first band."""
    if f"{prefix}head.word_proj.weight" in state:
        return matrix(state, f"{prefix}head.word_proj.weight", what, width)
    projection = matrix(state, f"{prefix}head.word_proj.0.weight", what, width)
    table = matrix(state, f"{prefix}head.word_proj.1.weight", what, projection.shape[0])
    # The labels are of the full width, so the items have to be as well.
    out: Tensor = (table.double() @ projection.double()).to(table.dtype)
    return out


def _same_width(widths: list[int], what: str) -> None:
    if len(set(widths)) > 1:
        raise ValueError(f"the bands of {what} have different widths: {widths}")
