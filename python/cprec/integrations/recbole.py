"""CpRec as a model of RecBole 1.2: :class:`cprec.model.NextItNet` behind RecBole's item ids, losses and scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cprec.model import NextItNet, NextItNetConfig
from cprec.planning import plan_model

try:
    from recbole.model.abstract_recommender import SequentialRecommender
    from recbole.utils import InputType
except ImportError as error:
    raise ImportError(
        f"cprec.integrations.recbole needs RecBole 1.2, which cannot be imported here ({error}): pip install recbole"
    ) from error

# Key of RecBole's configuration -> field of NextItNetConfig; RecBole's own models use the first six names.
FIELDS = {
    "embedding_size": "embedding_dim",
    "dilations": "dilations",
    "block_num": "repeats",
    "kernel_size": "kernel_size",
    "dropout_prob": "dropout",
    "label_smoothing": "label_smoothing",
    "block": "block",
    "sharing": "sharing",
    "head_bias": "head_bias",
    "tail_bias": "tail_bias",
    "tie_tails": "tie_tails",
}
DEFAULT_CUTOFFS = (0.05, 0.2)


class CpRec(SequentialRecommender):  # type: ignore[misc]
    """NextItNet with a block embedding and a clustered softmax (CpRec, arXiv 2004.13139), for RecBole's trainer.

    RecBole numbers items 1..n_items-1 in no order, and pads with 0; the network numbers them by falling frequency. Two
    buffers, which travel with ``state_dict``, translate. Everything outside is in RecBole's ids.

    Args:
        config: RecBole's Config. Every key is optional: ``embedding_size`` (64), ``dilations`` ([1, 2, 4, 8]),
            ``block_num`` (1; repeats the list), ``kernel_size`` (3), ``block``, ``sharing``, ``dropout_prob`` (0),
            ``label_smoothing``, ``head_bias``, ``tail_bias`` as in :class:`cprec.model.NextItNetConfig`; ``cutoffs``
            ([0.05, 0.2]: fractions of the catalogue, or item numbers; [] is one cluster) and ``ranks`` (falling by 4
            from the width); or ``compression`` in their place, which plans both from the counts
            (:func:`cprec.planning.plan_model`); ``tie_tails``, by default True with ``compression`` and False without.
            ``train_neg_sample_args`` must be None, because the loss is over the
            whole catalogue.
        dataset: the training part, ``train_data._dataset``; its counted interactions decide the order of items.

    Attributes:
        net: the :class:`cprec.model.NextItNet`.
        item_of_id: (n_items,) int64, the network's number of every id; n_items - 1, its padding, for id 0.
        id_of_item: (n_items - 1,) int64, the way back.

    Raises:
        TypeError, ValueError: a key has a value that cannot be used; the message names the key.
    """

    input_type = InputType.POINTWISE

    item_of_id: Tensor
    id_of_item: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        _check_loss(config)
        counts = self._training_counts(dataset)[1:]
        order = torch.argsort(counts, descending=True, stable=True)
        num_items = len(order)
        self.net = NextItNet(_model_config(config, counts[order]))
        item_of_id = torch.full((self.n_items,), num_items)
        item_of_id[order + 1] = torch.arange(num_items)
        self.register_buffer("item_of_id", item_of_id)
        self.register_buffer("id_of_item", order + 1)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Hidden states (B, d) of the newest items of right-padded histories (B, L), of lengths (B,) of at least 1.

        The network is causal, so what stands behind the newest item does not reach its state.
        """
        hidden: Tensor = self.gather_indexes(self.net(self.item_of_id[item_seq]), item_seq_len - 1)
        return hidden

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean cross-entropy of the next item, a scalar.

        RecBole's training part has a row for every prefix of a history, so an epoch sums over the same predictions as
        :meth:`NextItNet.loss` of whole histories.
        """
        loss: Tensor = self.net.softmax(self._hidden(interaction), self.item_of_id[interaction[self.POS_ITEM_ID]]).loss
        return loss

    def predict(self, interaction: Any) -> Tensor:
        """Log-probability (B,) of the item that each row names; -inf for the padding id 0. Without gradients."""
        items = self.item_of_id[interaction[self.ITEM_ID]]
        is_item = items < len(self.id_of_item)
        scores = self.net.softmax.score(self._hidden(interaction), torch.where(is_item, items, 0).unsqueeze(1))
        return scores.squeeze(1).masked_fill(~is_item, -torch.inf)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Log-probabilities (B, n_items) of all ids; -inf for the padding id 0, which is no item."""
        log_prob: Tensor = self.net.softmax.log_prob(self._hidden(interaction))
        scores = log_prob.new_full((log_prob.shape[0], self.n_items), -torch.inf)
        return scores.index_copy_(1, self.id_of_item, log_prob)

    def topk(
        self, interaction: Any, k: int, exclude: Tensor | None = None, storage: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k most probable items, exact, without the matrix of scores and without gradients.

        Args:
            exclude: (B, m) ids never to return; 0 is skipped, so ``interaction[model.ITEM_SEQ]`` may be given.
            storage: as in :meth:`NextItNet.topk`.

        Returns:
            scores (B, k) log-probabilities, descending, and ids (B, k); -inf and 0 where items ran out.
        """
        if exclude is not None:
            exclude = self.item_of_id[exclude]
            exclude = exclude.masked_fill(exclude == self.net.padding_id, -1)
        with torch.no_grad():
            scores, items = self.net.softmax.topk(self._hidden(interaction), k, exclude=exclude, storage=storage)
        return scores, torch.where(items >= 0, self.id_of_item[items.clamp(min=0)], 0)

    def _hidden(self, interaction: Any) -> Tensor:
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])

    def _training_counts(self, dataset: Any) -> Tensor:
        """How often every id (n_items,) was met: as a target, or as the first item of a history, which is no target."""
        rows = dataset.inter_feat
        counts = torch.bincount(torch.as_tensor(rows[self.ITEM_ID]), minlength=self.n_items)
        if self.ITEM_SEQ in rows.columns:
            first = rows[self.ITEM_SEQ][rows[self.ITEM_SEQ_LEN] == 1, 0]
            counts += torch.bincount(first, minlength=self.n_items)
        return counts


def _check_loss(config: Any) -> None:
    if config["loss_type"] not in (None, "CE"):
        raise ValueError(f"loss_type = {config['loss_type']!r}, but CpRec trains with 'CE' alone: leave loss_type out")
    sampling = config["train_neg_sample_args"]
    if sampling and sampling.get("distribution") != "none":
        raise ValueError(
            f"train_neg_sample_args = {sampling}, but CpRec's loss is over the whole catalogue and takes no negative "
            "samples: set train_neg_sample_args to None (~ in YAML)"
        )


def _model_config(config: Any, counts: Tensor) -> NextItNetConfig:
    """The network of a RecBole configuration, for items of these falling counts (K,)."""
    options = {field: config[key] for key, field in FIELDS.items() if config[key] is not None}
    options.setdefault("tie_tails", config["compression"] is not None)  # as `cprec train` does
    cutoffs, ranks, compression = config["cutoffs"], config["ranks"], config["compression"]
    for name, value in {"cutoffs": cutoffs, "ranks": ranks}.items():
        if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise TypeError(f"{name} must be a list, got {value!r}")
    try:
        model = NextItNetConfig.from_plan(len(counts), **options)
        if compression is None:
            cutoffs = DEFAULT_CUTOFFS if cutoffs is None else cutoffs
            falling = [max(1, model.embedding_dim >> 2 * j) for j in range(len(cutoffs) + 1)]
            return NextItNetConfig.from_plan(
                len(counts), cutoffs=cutoffs, ranks=falling if ranks is None else ranks, **options
            )
        if cutoffs is not None or ranks is not None:
            raise ValueError(f"compression = {compression} chooses cutoffs and ranks itself: leave those out, or it")
        if isinstance(compression, bool) or not isinstance(compression, int | float):
            raise TypeError(f"compression must be a number, got {compression!r}")
        return plan_model(model, counts.numpy(), compression).config
    except (TypeError, ValueError) as error:
        raise type(error)(_in_keys(str(error))) from error


def _in_keys(message: str) -> str:
    """A message in the names of RecBole's keys."""
    for key, field in FIELDS.items():
        message = re.sub(rf"\b{field}\b", key, message)
    return message
