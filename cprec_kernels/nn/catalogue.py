"""A catalogue that changes: which item becomes which, and an optimizer's state that follows its rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..partition import Partition
from .pretrained import refuse_parametrized

Optimizers = Optimizer | Sequence[Optimizer] | None

# State of an optimizer that has a row per row of its parameter, and what a row without a past starts with.
FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})  # zero
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg"})  # the mean of the others
PENDING = frozenset({"row_log_decay"})  # zero: nothing is pending after apply_pending_decay


@dataclasses.dataclass(frozen=True)
class CatalogueChange:
    """What a change of the catalogue did.

    Attributes:
        partition: the clusters now, padding left out.
        old_ids: (K',) int64, the id that every item had, -1 for a new one.
        new_ids: (K,) int64, the id that every former item has now, -1 for a removed one.
        errors: per cluster, the norm of what its rows lost relative to theirs: 0.0 where they were kept as they are, rounding
            where the rank allows it.
        parent_errors: per tail of a softmax, the root mean square over ``inputs`` of what a new parent label is off; 0.0 for
            a label that was kept, NaN for a new one without inputs. Empty for an embedding.
    """

    partition: Partition
    old_ids: Tensor
    new_ids: Tensor
    errors: tuple[float, ...]
    parent_errors: tuple[float, ...] = ()


class Reordering(NamedTuple):
    """New clusters, and the former id of every item in them (-1: new)."""

    partition: Partition
    old_ids: Tensor

    def new_ids(self, num_items: int) -> Tensor:
        """The new id of each of ``num_items`` former items, -1 where there is none."""
        out = torch.full((num_items,), -1, dtype=torch.int64, device=self.old_ids.device)
        kept = self.old_ids >= 0
        out[self.old_ids[kept]] = kept.nonzero().squeeze(1)
        return out


def extended(partition: Partition, new_items: int, device: torch.device) -> Reordering:
    """New items behind all others, in the last cluster."""
    if isinstance(new_items, bool) or not isinstance(new_items, int):
        raise TypeError(f"new_items must be an int, got {new_items!r}")
    if new_items < 0:
        raise ValueError(f"new_items must be at least 0, got {new_items}")
    total = partition.num_items + new_items
    old_ids = torch.arange(total, device=device)
    old_ids[partition.num_items :] = -1
    return Reordering(Partition(total, partition.cutoffs, partition.ranks, partition.embedding_dim), old_ids)


def removed(partition: Partition, items: Tensor | Sequence[int], device: torch.device) -> Reordering:
    """The others, in their order; a tail that loses all of its items goes."""
    given = torch.as_tensor(items, device=device).reshape(-1)
    if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
        raise TypeError(f"items must be integers, got {given.dtype}")
    given = given.long()
    bad = (given < 0) | (given >= partition.num_items)
    if bad.any():
        raise IndexError(f"item {int(given[bad][0])} is outside 0..{partition.num_items - 1}")
    keep = torch.ones(partition.num_items, dtype=torch.bool, device=device)
    keep[given] = False
    sizes = [int(part.sum()) for part in keep.split(list(partition.sizes))]
    if sizes[0] == 0:
        raise ValueError(
            f"all {partition.sizes[0]} items of cluster 0 would go: repartition first, so that others take their place"
        )
    left = [j for j, size in enumerate(sizes) if size]
    ends = list(itertools.accumulate(sizes[j] for j in left))
    new = Partition(ends[-1], ends[:-1], [partition.ranks[j] for j in left], partition.embedding_dim)
    return Reordering(new, keep.nonzero().squeeze(1))


def reordered(
    partition: Partition, counts: Tensor | Sequence[float] | None, new: Partition | None, device: torch.device
) -> Reordering:
    """The same items by falling count, ties in their order, cut by ``new`` or as they were."""
    if counts is None and new is None:
        raise ValueError("give new counts, a new partition, or both")
    new = new or partition
    for name in ("num_items", "embedding_dim"):
        if getattr(new, name) != getattr(partition, name):
            raise ValueError(
                f"the new partition has {name} = {getattr(new, name)}, the module {getattr(partition, name)} "
                "(padding left out): extend and remove change items, and the width stays"
            )
    if counts is None:
        return Reordering(new, torch.arange(new.num_items, device=device))
    return Reordering(new, torch.argsort(checked_counts(counts, partition, device), descending=True, stable=True))


def checked_counts(counts: Tensor | Sequence[float], partition: Partition, device: torch.device) -> Tensor:
    """Counts (K,) in fp64. Raises ValueError for another length, negative ones, NaN and inf."""
    given = torch.as_tensor(counts, device=device).detach().double()
    if given.shape != (partition.num_items,):
        raise ValueError(f"counts must be ({partition.num_items},), one per item, got shape {tuple(given.shape)}")
    if not bool((given.isfinite() & (given >= 0)).all()):
        raise ValueError("counts must be finite and not negative")
    return given


class NewParameter(NamedTuple):
    """A parameter that takes a place: of which rows of which former one, or None for rows that are new in all.

    ``like`` is the former parameter in whose group and with whose step count it goes on.
    """

    value: nn.Parameter
    like: nn.Parameter
    source: tuple[nn.Parameter, Tensor] | None


def optimizers_of(optimizer: Optimizers) -> list[Optimizer]:
    """As a list. Raises TypeError for something that is no optimizer."""
    found = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for one in found:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
    return found


def check_state(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> None:
    """Raise ValueError for state that is not known to be a row's, and for a parameter that learns in none of the
    optimizers while others do; before anything is changed."""
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    strangers = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in held]
    if optimizers and strangers:
        raise ValueError(
            f"a parameter of shape {tuple(strangers[0].shape)} is in none of the optimizers, so what takes its place would "
            "not learn: pass all optimizers that train this module. If another module shared it, and was changed before, "
            "it has another one now: modules that share tables cannot be changed one after the other; build both anew"
        )
    known = FIRST_MOMENTS | SECOND_MOMENTS | PENDING
    for optimizer in optimizers:
        for parameter in parameters:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim() and name not in known:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {name!r}, which is not known to belong to rows: only "
                        f"{', '.join(sorted(known))} can be carried along"
                    )
                if isinstance(value, Tensor) and value.layout != torch.strided:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {name!r} as {value.layout}, whose rows cannot be carried along: "
                        "make it dense first, state[parameter][name] = value.to_dense()"
                    )


def carry_state(
    optimizers: Sequence[Optimizer], former: Sequence[nn.Parameter], replaced: Sequence[NewParameter]
) -> None:
    """Put new parameters in the place of former ones, with the state of their rows.

    Rows that were kept keep their moments bit for bit. Rows without a past start with a first moment of zero and the mean
    second moment of the parameter they are like, so that the first step is neither huge nor none.
    """
    followers: dict[int, list[NewParameter]] = {id(parameter): [] for parameter in former}
    for new in replaced:
        followers[id(new.like)].append(new)
    for optimizer in optimizers:
        states = {id(parameter): optimizer.state.pop(parameter, {}) for parameter in former}
        for group in optimizer.param_groups:
            params, names = [], []
            given = group.get("param_names", [""] * len(group["params"]))
            for found, name in zip(group["params"], given, strict=True):
                if id(found) not in followers:
                    params.append(found)
                    names.append(name)
                    continue
                for place, new in enumerate(followers[id(found)]):
                    params.append(new.value)
                    names.append(f"{name}+{place}" if place else name)
                    if state := states[id(found)]:
                        own = states[id(found if new.source is None else new.source[0])]
                        optimizer.state[new.value] = _carried(new, state, own)
            group["params"][:] = params
            if "param_names" in group:
                group["param_names"][:] = names


def _carried(new: NewParameter, like: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """State of a new parameter from that of the one it is like and that of the one its rows come from."""
    if new.value is new.like:
        return like
    out = {}
    for name, value in like.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            out[name] = value.clone() if isinstance(value, Tensor) else value
            continue
        shape = new.value.shape if value.dim() == new.like.dim() else new.value.shape[:1]
        fill = float(value.double().mean()) if name in SECOND_MOMENTS and value.numel() else 0.0
        rows = torch.full(shape, fill, dtype=value.dtype, device=value.device)
        if new.source is not None and name in own:
            index = new.source[1]
            known = index >= 0
            rows[known] = own[name][index[known]]
        out[name] = rows
    return out


def settle(optimizers: Sequence[Optimizer]) -> None:
    """Let row-wise optimizers apply the weight decay that rows are waiting for."""
    for optimizer in optimizers:
        pending = getattr(optimizer, "apply_pending_decay", None)
        if pending is not None:
            pending()


class ChangingCatalogue:
    """What a block embedding and a clustered softmax share of changing their items, in place.

    Optimizers that are given go on: new parameters take the places of former ones in their groups, with the moments of
    the rows that were kept, bit for bit, for torch's Adam, AdamW, SparseAdam, Adagrad and SGD and for the row-wise ones
    of :mod:`cprec_kernels.optim`, whose pending decay is applied first. Wrappers that know parameters, such as DDP, are
    to be made anew. Nothing is changed when an exception is raised.
    """

    owner: str | None = None  # what the module is a part of, if its items are not its own to change

    def _items(self) -> Partition:
        """The clusters of the items, padding left out."""
        raise NotImplementedError

    def _change(self, order: Reordering, optimizers: list[Optimizer]) -> CatalogueChange:
        raise NotImplementedError

    def _check_changeable(self) -> None:
        if self.owner is not None:
            raise RuntimeError(f"this module is part of {self.owner}, whose items would no longer fit")
        refuse_parametrized(self, "its items cannot be changed")

    @torch.no_grad()
    def extend(self, new_items: int, *, optimizer: Optimizers = None) -> CatalogueChange:
        """Add items at the end, in the last cluster: ids K..K + new_items - 1; a padding row stays behind them.

        What is there stays as it is: embeddings, and every item's logit in its level. New items start with the mean row (and
        bias) of their cluster. A softmax's tail then spreads its probability over more items.

        Args:
            new_items: how many.
            optimizer: one or several, whose state goes along.

        Raises:
            RuntimeError: the module is a part of one that has the items too, or a parameter is parametrized.
            TypeError: new_items not an int, something that is no optimizer.
            ValueError: new_items negative, a padding id that is not the last, an optimizer whose state is not known,
                a parameter that learns in none of the optimizers.
        """
        self._check_changeable()
        partition = self._items()
        return self._change(extended(partition, new_items, self._device()), optimizers_of(optimizer))

    @torch.no_grad()
    def remove(self, items: Tensor | Sequence[int], *, optimizer: Optimizers = None) -> CatalogueChange:
        """Take items out; the others keep their order and move up, see ``new_ids`` of the result.

        Embeddings of the others stay, and their logits in their levels; a tail that loses all items goes, and its parent
        label with it. The probability of what is removed falls to the others of its cluster.

        Args:
            items: ids, in any order, as often as they come.
            optimizer: one or several, whose state goes along.

        Raises:
            IndexError: an item out of range.
            RuntimeError: the module is a part of one that has the items too, or a parameter is parametrized.
            TypeError: items not integers, something that is no optimizer.
            ValueError: cluster 0 would be empty, a padding id that is not the last, an optimizer whose state is not known,
                a parameter that learns in none of the optimizers.
        """
        self._check_changeable()
        partition = self._items()
        return self._change(removed(partition, items, self._device()), optimizers_of(optimizer))

    def _device(self) -> torch.device:
        assert isinstance(self, nn.Module)
        return next(self.parameters()).device
