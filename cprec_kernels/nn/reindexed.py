"""A compressed table and softmax under the ids that a model already uses, whatever their order."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..ops._library import check_ids, check_integers, check_leading, check_tensor
from ..ops.clustered_topk import Exclude
from .block_embedding import BlockEmbedding
from .catalogue import ChangingCatalogue
from .clustered_softmax import ClusteredSoftmaxOutput
from .softmax_base import ClusteredSoftmaxBase

# Log-probability of a class that the softmax leaves out: 0 as a probability in every dtype, and finite, so that masks and
# smoothing make no NaN of it.
ABSENT = -1e4


class HoldsPermutations(nn.Module):
    """A module with tensors of ids that move with it and travel with ``state_dict``, as buffers do, and are none.

    Weight averaging takes every buffer for numbers of which there is a mean: torch's ``AveragedModel(use_buffers=True)``
    and Lightning's ``EMAWeightAveraging`` would round a permutation to one that is none, without a word. And DDP would send
    them round before every forward pass. What sends parameters and buffers round leaves these out, so every process has to
    load them.
    """

    items: Tensor
    _permutations: tuple[str, ...] = ()  # names of attributes
    _awaited = False  # a state is to bring them

    def await_state(self) -> None:
        """Refuse to compute until a state has been loaded, whose ids are to replace these."""
        self._awaited = True

    def _check_there(self) -> None:
        if self._awaited:
            raise RuntimeError(
                f"this {type(self).__name__} waits for the ids of a compressed model: load its state_dict, in every process "
                "(what DDP and FSDP send round does not hold them)"
            )

    def _looked_up(self, ids: Tensor, name: str) -> Tensor:
        """items[ids]. Raises IndexError, TypeError or ValueError for ids that are none, in the caller's own numbers."""
        self._check_there()
        items = self.items
        check_tensor(ids, name)
        check_integers(ids, name)
        if ids.device != items.device:
            raise ValueError(f"{name} is on {ids.device}, the module on {items.device}: move one of them")
        if torch.compiler.is_compiling():
            ids = torch.where(ids < 0, items.numel(), ids)  # which the lookup refuses; it may count -1 from the end
        elif _has_values(ids):
            check_ids(ids, items.numel(), name)
        return items.index_select(0, ids.reshape(-1)).reshape(ids.shape)

    def _numbered(self, name: str, ids: Tensor) -> tuple[Tensor, int]:
        """Those of ``ids``, for the attribute ``name``, that number something, and how many there are of that."""
        raise NotImplementedError

    def _why_not(self, name: str, ids: Tensor) -> str:
        """What is wrong with ids that are to be loaded, "" if nothing."""
        if ids.is_meta:
            return ""
        try:
            _check_items(*self._numbered(name, ids))
        except ValueError as error:
            return str(error)
        return ""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._permutations:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._permutations:
            ids: Tensor = getattr(self, name)
            destination[prefix + name] = ids if keep_vars else ids.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        problems = len(missing_keys) + len(error_msgs)
        for name in self._permutations:
            key, own = prefix + name, getattr(self, name)
            if key not in state_dict:
                missing_keys.append(key)
                continue
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            given = state_dict[key]
            if not isinstance(given, Tensor) or given.shape != own.shape or given.dtype != own.dtype:
                described = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                error_msgs.append(f"{key}: {own.dtype} {tuple(own.shape)} is needed, got {described}")
            elif reason := self._why_not(name, given):
                error_msgs.append(f"{key}: {reason}")
            elif local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, given.detach())
            else:
                own.copy_(given)
        if len(missing_keys) + len(error_msgs) == problems:
            self._awaited = False


class ReindexedEmbedding(HoldsPermutations):
    """In the place of an ``nn.Embedding``: takes its ids, and looks them up in a table sorted by frequency.

    A :class:`BlockEmbedding` numbers items by falling frequency. This module keeps the permutation beside it, so that
    nothing outside has to change its ids. It travels with ``state_dict``, and is no buffer, which averages of weights
    would average.

    Args:
        embedding: the table.
        items: (V,) int64: the row of ``embedding`` that each id stands for, every row at most once.

    Attributes:
        num_embeddings, embedding_dim, padding_idx: as an ``nn.Embedding`` has them, in the outer ids.
        softmax: a :class:`ReindexedSoftmax` over the same blocks, or None; :func:`cprec_kernels.compress` sets it for a
            model that scores by the table itself.

    Raises:
        TypeError: not a BlockEmbedding, ``items`` not int64.
        ValueError: ``items`` not 1-D, out of range, or naming a row twice.
    """

    _permutations = ("items",)

    def _numbered(self, name: str, ids: Tensor) -> tuple[Tensor, int]:
        return ids, self.embedding.partition.num_items

    def __init__(self, embedding: BlockEmbedding, items: Tensor) -> None:
        super().__init__()
        if not isinstance(embedding, BlockEmbedding):
            raise TypeError(f"embedding must be a BlockEmbedding, got {type(embedding).__name__}")
        _check_items(items, embedding.partition.num_items)
        self.embedding = embedding
        embedding.owner = embedding.owner or "a ReindexedEmbedding"
        self.items = items
        self.num_embeddings = items.numel()
        self.embedding_dim = embedding.partition.embedding_dim
        self.softmax: ReindexedSoftmax | None
        self.register_module("softmax", None)
        self.padding_idx: int | None = None
        if embedding.padding_idx is not None:
            place = (items == embedding.padding_idx).nonzero()
            self.padding_idx = int(place[0]) if place.numel() else None

    def forward(self, ids: Tensor) -> Tensor:
        """(..., d) for ids (...) int64.

        Raises:
            IndexError: an id outside 0..num_embeddings-1. TypeError: ids that are not int64.
            ValueError: ids on another device.
        """
        out: Tensor = self.embedding(self._looked_up(ids, "ids"))
        return out

    @property
    def weight(self) -> Tensor:
        """The dense table (V, d) in the outer ids, computed anew each time; gradients reach the blocks.

        For code that reads ``embedding.weight``, such as ``hidden @ embedding.weight.T``. It costs what the dense table
        did; ``softmax`` of the compressed model does not. Writing to it changes nothing.
        """
        self._check_there()
        out: Tensor = self.embedding(self.items)
        return out

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class ReindexedSoftmax(HoldsPermutations):
    """In the place of an ``nn.Linear`` classifier: takes hidden states, and answers in the classes of that classifier.

    ``forward`` gives log-probabilities of all classes. Cross entropy, argmax and top-k of these are those of the
    clustered softmax, because normalised log-probabilities are logits of themselves, so a training loop written for
    logits goes on working, at the cost of the dense matrix of scores. :meth:`loss`, :meth:`topk`, :meth:`score` and
    :meth:`rank` do not make it: put them in the loop's place when it should be fast.

    Args:
        softmax: a ClusteredSoftmaxWithLoss or TiedBlocks, whose items are sorted by frequency.
        items: (C,) int64: the item that each class stands for, or -1 for a class that is none, such as padding, whose
            log-probability is -1e4 and which searches never return.

    Raises:
        TypeError: not a clustered softmax, ``items`` not int64.
        ValueError: ``items`` not 1-D, out of range, or without a class for some item.
    """

    classes: Tensor
    _permutations = ("items", "classes")

    def _numbered(self, name: str, ids: Tensor) -> tuple[Tensor, int]:
        if name == "classes":
            return ids, self.out_features
        return ids[ids >= 0], self.softmax.partition.num_items

    def __init__(self, softmax: ClusteredSoftmaxBase, items: Tensor) -> None:
        super().__init__()
        if not isinstance(softmax, ClusteredSoftmaxBase):
            raise TypeError(f"softmax must be a ClusteredSoftmaxWithLoss or TiedBlocks, got {type(softmax).__name__}")
        _check_items(items[items >= 0], softmax.partition.num_items)
        num_items = softmax.partition.num_items
        if int((items >= 0).sum()) != num_items:
            raise ValueError(
                f"items names {int((items >= 0).sum())} of the softmax's {num_items} items: all are needed"
            )
        classes = torch.empty(num_items, dtype=torch.int64, device=items.device)
        places = (items >= 0).nonzero().squeeze(1)
        classes[items[places]] = places
        self.softmax = softmax
        if isinstance(softmax, ChangingCatalogue):
            softmax.owner = "a ReindexedSoftmax"
        self.items = items
        self.classes = classes
        self.in_features = softmax.in_features
        self.out_features = items.numel()

    def forward(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (..., C) for hidden (..., d)."""
        self._check_there()
        log_prob = self.softmax.log_prob(hidden)
        inside = self.items >= 0
        return torch.where(inside, log_prob.index_select(-1, self.items.clamp(min=0)), ABSENT)

    def _targets(self, target: Tensor) -> Tensor:
        """Classes as items; classes that are none, and ``ignore_index``, as ignored."""
        check_tensor(target, "target")
        ignored = self.softmax.ignore_index
        known = target != ignored
        items = self._looked_up(torch.where(known, target, 0), "target")
        return torch.where(known & (items >= 0), items, ignored)

    def output(self, hidden: Tensor, target: Tensor) -> ClusteredSoftmaxOutput:
        """Log-probabilities of target classes (...), and the loss; ignored are ``softmax.ignore_index`` and padding.

        Raises:
            IndexError: a target outside 0..C-1. TypeError, ValueError: as the softmax's ``forward``.
        """
        out: ClusteredSoftmaxOutput = self.softmax(hidden, self._targets(target))
        return out

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The softmax's loss for hidden (..., d) and target classes (...): the head and the target's tail alone."""
        return self.output(hidden, target).loss

    def topk(
        self,
        hidden: Tensor,
        k: int,
        exclude: Exclude | None = None,
        candidates: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """The k most probable classes, exact: scores and classes (..., k), -inf and -1 where fewer are left.

        Args:
            hidden: (..., d).
            k: how many.
            exclude: classes never to return, (..., m) per row, or (offsets, classes) as the softmax's ``topk`` takes them;
                negative entries and padding are skipped, so a padded history can be passed as it is.
            candidates: (C',) the only classes to return; padding among them is none.
            options: those of the softmax's ``topk``, such as ``storage``.

        Raises:
            IndexError: a class outside 0..C-1. TypeError, ValueError: as the softmax's ``topk``.
        """
        self._check_there()
        if isinstance(exclude, Tensor):
            exclude = self._excluded(exclude)
        elif isinstance(exclude, tuple) and len(exclude) == 2:
            exclude = (exclude[0], self._excluded(exclude[1]))
        if candidates is not None:
            candidates = self._looked_up(candidates, "candidates")
            candidates = candidates[candidates >= 0]
        scores, items = self.softmax.topk(hidden, k, exclude=exclude, candidates=candidates, **options)
        found = self.classes.index_select(0, items.clamp(min=0).reshape(-1)).reshape(items.shape)
        return scores, torch.where(items >= 0, found, -1)

    def score(self, hidden: Tensor, classes: Tensor) -> Tensor:
        """Log-probabilities of given classes (..., c), such as another model's candidates, for re-ranking them.

        Not differentiable, as the softmax's ``score``.

        Raises:
            IndexError: a class outside 0..C-1. TypeError, ValueError: as the softmax's ``score``.
        """
        items = self._looked_up(classes, "classes")
        check_leading(classes, hidden, "classes", 1)
        return torch.where(items >= 0, self.softmax.score(hidden, items.clamp(min=0)), ABSENT)

    def rank(self, hidden: Tensor, target: Tensor) -> Tensor:
        """0-based place of every target class (...) among all items; ties by higher frequency.

        Raises:
            IndexError: a target that is no item.
        """
        items = self._looked_up(target, "target")
        seen = not torch.compiler.is_compiling() and _has_values(items) and items.device.type == "cpu"
        if seen and bool((items < 0).any()):
            place = tuple((items < 0).nonzero()[0].tolist())
            raise IndexError(
                f"target{list(place)} = {int(target[place])} is a class that no item stands for: it has no rank"
            )
        return self.softmax.rank(hidden, items)

    def _excluded(self, classes: Tensor) -> Tensor:
        """Classes as items, -1 for negative ones and those that are none."""
        check_tensor(classes, "exclude")
        items = self._looked_up(classes.clamp(min=0), "exclude")
        return torch.where(classes >= 0, items, -1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _has_values(ids: Tensor) -> bool:
    return not ids.is_meta and type(ids).__name__ != "FakeTensor"  # whose module takes seconds to import


def _check_items(items: Tensor, num_items: int) -> None:
    if items.dtype != torch.int64:
        raise TypeError(f"items must be int64, got {items.dtype}")
    if items.dim() != 1:
        raise ValueError(f"items must be 1-D, got shape {tuple(items.shape)}")
    if items.numel() and (int(items.min()) < 0 or int(items.max()) >= num_items):
        raise ValueError(f"items must be in 0..{num_items - 1}, got {int(items.min())}..{int(items.max())}")
    if items.unique().numel() != items.numel():
        raise ValueError("items names a row twice")
