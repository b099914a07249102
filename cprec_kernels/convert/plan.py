"""Where a model's item table and classifier are, and what takes their place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import BlockEmbedding, ClusteredSoftmaxWithLoss, ReindexedEmbedding, ReindexedSoftmax, TiedBlocks
from ..nn.block_embedding import load_factors
from ..nn.pretrained import own_tensors, read_folder, with_aliases, write_folder
from ..partition import Partition

TIED = "tied"


class Replacement(nn.Module):
    """What a plan makes: the embedding, the softmax or None, and the blocks they share or None."""

    def __init__(
        self, embedding: ReindexedEmbedding, softmax: ReindexedSoftmax | None, blocks: TiedBlocks | None
    ) -> None:
        super().__init__()
        self.embedding, self.softmax, self.blocks = embedding, softmax, blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionPlan:
    """The structure of a compressed model without its numbers: enough to load a checkpoint of it into a fresh one.

    Args:
        table: name of the item table in the model.
        classifier: name of the classifier; None where there was none to replace.
        tied: the classifier shares the table's blocks; without a classifier, the softmax is ``table.softmax``.
        partition: clusters of the table's items, padding left out.
        output_partition: clusters of the classifier's items; None without a softmax.
        num_embeddings, num_classes: ids that the table takes, classes that the softmax answers with.
        padding_idx: the table's id that is no item, or None.
        bias: the classifier has a bias for every class.
        sparse: the table gives sparse gradients.
    """

    table: str
    classifier: str | None
    tied: bool
    partition: Partition
    output_partition: Partition | None
    num_embeddings: int
    num_classes: int
    padding_idx: int | None
    bias: bool
    sparse: bool

    def apply(self, model: nn.Module) -> Replacement:
        """Replace table and classifier of an uncompressed model, with parameters still to be loaded.

        Example:
            >>> CompressionPlan.from_dict(json.load(file)).apply(model)
            >>> model.load_state_dict(state)  # of the compressed model: ids and all

        The state is to be loaded in every process of a distributed run: ids are not among what DDP and FSDP send round.
        Until then the modules refuse to compute.

        Raises:
            AttributeError: the model has no modules of these names.
        """
        weight = model.get_submodule(self.table).weight
        assert isinstance(weight, Tensor)
        identity = torch.arange(self.partition.num_items, device="cpu" if weight.is_meta else weight.device)
        made = self.build(identity, weight)
        for module in (made.embedding, made.softmax):
            if module is not None:
                module.await_state()
        self.install(model, made)
        return made

    def build(self, order: Tensor, like: Tensor) -> Replacement:
        """The modules, on the device and in the dtype of ``like``; ``order`` (K,) holds the item ids by falling frequency,
        numbered without the padding."""
        kind: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        num_items = self.partition.num_items
        place = torch.empty_like(order)
        place[order] = torch.arange(num_items, device=order.device)
        padded = self._with_padding(place, num_items)
        blocks = None
        softmax: TiedBlocks | ClusteredSoftmaxWithLoss | None = None
        if self.tied:
            kind |= {"head_bias": self.bias or self.partition.num_clusters > 1, "tail_bias": self.bias}
            blocks = softmax = TiedBlocks(self.partition, self.padding_idx is not None, **kind)
            table = blocks.embedding
        else:
            padding = self.padding_idx is not None
            partition = self.partition.with_padding() if padding else self.partition
            table = BlockEmbedding(partition, -1 if padding else None, self.sparse, **kind)
            if self.output_partition is not None:
                head_bias = self.bias or self.output_partition.num_clusters > 1
                softmax = ClusteredSoftmaxWithLoss(
                    self.output_partition.embedding_dim, self.output_partition, head_bias, self.bias, **kind
                )
        classes = place.clone() if self.num_classes == num_items else self._with_padding(place, -1)
        wrapped = None if softmax is None else ReindexedSoftmax(softmax, classes)
        embedding = ReindexedEmbedding(table, padded)
        if self.tied and self.classifier is None:
            embedding.softmax = wrapped
        return Replacement(embedding, wrapped, blocks)

    def _with_padding(self, place: Tensor, value: int) -> Tensor:
        """``place`` with ``value`` at the padding id."""
        if self.padding_idx is None:
            return place
        middle = place.new_tensor([value])
        return torch.cat([place[: self.padding_idx], middle, place[self.padding_idx :]])

    def install(self, model: nn.Module, made: Replacement) -> None:
        """Put the modules in their places, under every name that leads there."""
        pairs: list[tuple[str, nn.Module]] = [(self.table, made.embedding)]
        if self.classifier is not None and made.softmax is not None:
            pairs.append((self.classifier, made.softmax))
        for name, module in pairs:
            old = model.get_submodule(name)
            module.train(old.training)
            aliases = [alias for alias, found in model.named_modules(remove_duplicate=False) if found is old]
            for alias in aliases:
                parent, _, attribute = alias.rpartition(".")
                setattr(model.get_submodule(parent), attribute, module)

    def save_pretrained(self, model: nn.Module, folder: str | os.PathLike[str]) -> Path:
        """Write a compressed model to a folder: this plan as ``config.json``, all of its state as ``model.safetensors``.

        Raises:
            FileExistsError: ``folder`` is a file, or holds a config.json of another program.
            ImportError: the safetensors package is missing.
        """
        return write_folder(folder, {"module": type(self).__name__, "plan": self.to_dict()}, own_tensors(model))

    @classmethod
    def load_pretrained(cls, model: nn.Module, folder: str | os.PathLike[str]) -> CompressionPlan:
        """Turn a dense model, made as it was before it was compressed, into that of a folder, in place.

        Raises:
            AttributeError: the model has no modules of the plan's names.
            FileNotFoundError, ImportError, ValueError: as ``from_pretrained`` of a module; where other parameters of the
                model do not fit, its table and classifier have been replaced already.
        """
        config, tensors = read_folder(folder, None)
        if config.get("module") != cls.__name__:
            raise ValueError(f"{folder} holds a {config.get('module')}, not a compressed model")
        plan = cls.from_dict(config["plan"])
        plan.apply(model)
        load_factors(model, with_aliases(model, tensors))
        return plan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("partition", "output_partition"):
            values[name] = None if values[name] is None else values[name].to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionPlan:
        """A plan from :meth:`to_dict`. Raises ValueError for missing or unknown keys."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(values) != expected:
            missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
            raise ValueError(f"not a compression plan: missing keys {missing}, unknown keys {unknown}")
        given = dict(values)
        for name in ("partition", "output_partition"):
            given[name] = None if given[name] is None else Partition.from_dict(given[name])
        return cls(**given)


def find_table(model: nn.Module, count: int, name: str | None) -> tuple[str, nn.Embedding]:
    """The item table: an ``nn.Embedding`` with one row per count, by name or the only one.

    Raises:
        TypeError: the model is no module, the named one not an nn.Embedding.
        ValueError: none, several, or one whose behaviour blocks do not have.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    tables = {found: module for found, module in model.named_modules() if isinstance(module, nn.Embedding)}
    if name is None:
        fitting = [found for found, module in tables.items() if module.num_embeddings == count]
        if len(fitting) != 1:
            sizes = ", ".join(f"{found} ({module.num_embeddings})" for found, module in tables.items()) or "none"
            hint = "name the item table with table=" if fitting else "counts has one entry per row of the item table"
            done = [found for found, module in model.named_modules() if isinstance(module, ReindexedEmbedding)]
            if done and not fitting:
                hint = f"{done[0] or 'it'} is compressed already, and a model is compressed from its uncompressed form"
            raise ValueError(
                f"{len(fitting)} embeddings have {count} rows, as many as counts; there are {sizes}: {hint}"
            )
        name = fitting[0]
    module = model.get_submodule(name)
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"table {name!r} must be an nn.Embedding, it is a {type(module).__name__}")
    if not name:
        raise ValueError("the model is the table itself: it cannot be replaced in place; wrap it in a module")
    if module.num_embeddings != count:
        raise ValueError(f"counts has {count} entries, but table {name!r} has {module.num_embeddings} rows")
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            raise ValueError(f"table {name!r} uses {option}, which a block embedding does not have")
    _refuse_own_forward(f"table {name!r}", module, nn.Embedding)
    return name, module


def _refuse_own_forward(what: str, module: nn.Module, plain: type[nn.Module]) -> None:
    """Raise ValueError for a module that does more than its class does: what takes its place would not."""
    if type(module).forward is not plain.forward or "forward" in vars(module):
        raise ValueError(
            f"{what} is a {type(module).__name__} with a forward of its own, which what takes its place would not have: "
            f"do that in the model, and let the module be a plain nn.{plain.__name__}"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{what} has forward hooks, which what takes its place would not have: remove them first")


def find_classifier(
    model: nn.Module, name: str | None, table: nn.Embedding, num_items: int
) -> tuple[str | None, nn.Linear | None]:
    """The classifier: an ``nn.Linear`` with one output per id of the table, or per item; None where there is none.

    Raises:
        TypeError: the named module is not an nn.Linear.
        ValueError: several, one of another number of classes, or one that does more than an nn.Linear.
    """
    sizes = {table.num_embeddings, num_items}
    if name is None:
        fitting = [
            found
            for found, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features in sizes
        ]
        if len(fitting) > 1:
            raise ValueError(
                f"several linear layers have one output per item: {', '.join(fitting)}; name one with classifier="
            )
        if not fitting:
            return None, None
        name = fitting[0]
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"classifier {name!r} must be an nn.Linear, it is a {type(module).__name__}")
    if not name:
        raise ValueError("the model is the classifier itself: it cannot be replaced in place; wrap it in a module")
    if module.out_features not in sizes:
        raise ValueError(
            f"classifier {name!r} has {module.out_features} outputs: one per id ({table.num_embeddings}) or per item "
            f"({num_items}) is needed"
        )
    _refuse_own_forward(f"classifier {name!r}", module, nn.Linear)
    return name, module
