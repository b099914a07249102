"""The configuration of a NextItNet: everything that decides its parameters and its maths, checked when it is made."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from cprec.model.sharing import BlockKind, Sharing, backbone_parameters, check_sharing
from cprec_kernels import Partition

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextItNetConfig:
    """What a :class:`cprec.model.NextItNet` is made of.

    Args:
        num_items: items in the catalogue, K. Item ids are 0..K-1 by falling frequency; K is the input's padding id.
        embedding_dim: width d of the model.
        input_partition: clusters of the input embedding over ``num_items`` items; the model adds the padding row.
        output_partition: clusters of the softmax over ``num_items`` items.
        dilations: dilation of every block, in order; a residual block uses l and 2 l.
        repeats: how many times the whole list of dilations is repeated.
        kernel_size: taps of a dilated convolution.
        block: "residual" or "bottleneck" (WSDM 2019, figures 3b and 3a).
        sharing: "none", "cross-layer", "cross-block", "adjacent-layer" or "adjacent-block", see
            :mod:`cprec.model.sharing`.
        dropout: probability of dropping an embedding value or a value that a block adds; 0 as published.
        head_bias, tail_bias, label_smoothing: of the clustered softmax.
        sparse_embedding: row-sparse gradients for the embedding tables.
        tie_tails: embedding and softmax, of one partition then, share the rows of all clusters but the first, each with
            projections of its own (:class:`cprec_kernels.nn.TiedBlocks`). A tail of the same rank then costs half, and a
            rare item learns from both of its roles.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is outside its range, or two values disagree. The message names both and says what to do.
    """

    num_items: int
    embedding_dim: int = 64
    input_partition: Partition
    output_partition: Partition
    dilations: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 1
    kernel_size: int = 3
    block: BlockKind = "residual"
    sharing: Sharing = "none"
    dropout: float = 0.0
    head_bias: bool = False
    tail_bias: bool = False
    label_smoothing: float = 0.0
    sparse_embedding: bool = False
    tie_tails: bool = False

    def __post_init__(self) -> None:
        dilations: object = self.dilations
        if isinstance(dilations, str) or not isinstance(dilations, Sequence):
            raise TypeError(f"dilations must be a list of integers such as (1, 2, 4, 8), got {dilations!r}")
        object.__setattr__(self, "dilations", tuple(dilations))
        self.validate()

    def validate(self) -> None:
        """Check every value; called on construction. Raises TypeError or ValueError as described on the class."""
        for name in ("num_items", "embedding_dim", "repeats", "kernel_size"):
            _check_positive(name, getattr(self, name))
        if not self.dilations:
            raise ValueError("dilations is empty: give at least one, e.g. (1, 2, 4, 8)")
        for i, dilation in enumerate(self.dilations):
            _check_positive(f"dilations[{i}]", dilation)
        for name in ("input_partition", "output_partition"):
            self._check_partition(name)
        check_sharing(self.block, self.sharing)
        if self.block == "bottleneck" and self.embedding_dim < 2:
            raise ValueError("a bottleneck block halves the width, so embedding_dim must be at least 2, got 1")
        for name in ("dropout", "label_smoothing"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} = {value} is outside [0, 1)")
        for name in ("head_bias", "tail_bias", "sparse_embedding", "tie_tails"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.tie_tails and self.input_partition != self.output_partition:
            raise ValueError("tie_tails needs one partition for embedding and softmax, but theirs differ")
        if self.tie_tails and self.embedding_dim in self.output_partition.ranks[1:]:
            raise ValueError(
                f"tie_tails needs tails of lower rank than embedding_dim = {self.embedding_dim}, got ranks "
                f"{list(self.output_partition.ranks)}: without projections one vector would serve both tables"
            )
        if self.tie_tails and self.sparse_embedding:
            raise ValueError(
                "tie_tails gives the tables dense gradients, since the softmax reads every row: turn off sparse_embedding"
            )

    def _check_partition(self, name: str) -> None:
        partition = getattr(self, name)
        if not isinstance(partition, Partition):
            raise TypeError(f"{name} must be a cprec_kernels.Partition, got {type(partition).__name__}")
        for field in ("num_items", "embedding_dim"):
            theirs, ours = getattr(partition, field), getattr(self, field)
            if theirs != ours:
                hint = " (leave the padding item out: the model adds it)" if theirs == ours + 1 else ""
                raise ValueError(f"{name}.{field} = {theirs} but {field} = {ours}: they must be equal{hint}")

    @property
    def num_blocks(self) -> int:
        return len(self.dilations) * self.repeats

    @property
    def block_dilations(self) -> tuple[int, ...]:
        """Dilation l of every block, the list repeated."""
        return self.dilations * self.repeats

    @property
    def receptive_field(self) -> int:
        """Items, the newest included, that can influence a hidden state: 1 + (k - 1) * sum of all dilations."""
        per_block = 3 if self.block == "residual" else 1
        return 1 + (self.kernel_size - 1) * per_block * sum(self.block_dilations)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, the padding row included."""
        return self.input_partition.with_padding().embedding_parameters

    @property
    def backbone_parameters(self) -> int:
        """Parameters of the residual blocks, see :func:`cprec.model.sharing.backbone_parameters`."""
        return backbone_parameters(self.num_blocks, self.block, self.sharing, self.embedding_dim, self.kernel_size)

    @property
    def softmax_parameters(self) -> int:
        """Parameters of the clustered softmax, biases included; without the rows that it shares with the embedding."""
        own = self.output_partition.softmax_parameters(self.head_bias, self.tail_bias)
        return own - self.shared_parameters

    @property
    def shared_parameters(self) -> int:
        """Parameters of tails that embedding and softmax share."""
        partition = self.output_partition
        tails = zip(partition.sizes[1:], partition.ranks[1:], strict=True)
        return sum(size * rank for size, rank in tails) if self.tie_tails else 0

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        return self.embedding_parameters + self.backbone_parameters + self.softmax_parameters

    def twin(self) -> NextItNetConfig:
        """The same model with a plain embedding table and a plain softmax: one full-rank cluster on both sides."""
        single = Partition.single(self.num_items, self.embedding_dim)
        return dataclasses.replace(self, input_partition=single, output_partition=single, tie_tails=False)

    @classmethod
    def from_plan(
        cls,
        num_items: int,
        embedding_dim: int = 64,
        cutoffs: Sequence[int | float] = (),
        ranks: Sequence[int] | None = None,
        *,
        output_cutoffs: Sequence[int | float] | None = None,
        output_ranks: Sequence[int] | None = None,
        **options: Any,
    ) -> NextItNetConfig:
        """A configuration from the numbers a person would type.

        Args:
            cutoffs: first item of every cluster but the first: all integers, or all fractions of the catalogue.
            ranks: columns per cluster, one more than ``cutoffs``. May be left out when there are no cutoffs.
            output_cutoffs, output_ranks: the same for the softmax; by default those of the input.
            options: any other field of :class:`NextItNetConfig`.

        Raises:
            TypeError, ValueError: as :class:`NextItNetConfig` and :class:`Partition`.

        Example:
            >>> NextItNetConfig.from_plan(1000, 64, [0.05, 0.2], [64, 16, 4]).input_partition.sizes
            (50, 150, 800)
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"input_partition", "output_partition"}
        _check_keys(set(options), known, "options")
        input_partition = _partition("", num_items, embedding_dim, cutoffs, ranks)
        output_partition = input_partition
        if output_cutoffs is not None or output_ranks is not None:
            output_partition = _partition(
                "output_",
                num_items,
                embedding_dim,
                cutoffs if output_cutoffs is None else output_cutoffs,
                ranks if output_ranks is None else output_ranks,
            )
        return cls(
            num_items=num_items,
            embedding_dim=embedding_dim,
            input_partition=input_partition,
            output_partition=output_partition,
            **options,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with a format version; :meth:`from_dict` reads them back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["dilations"] = list(self.dilations)
        values["input_partition"] = self.input_partition.to_dict()
        values["output_partition"] = self.output_partition.to_dict()
        if not self.tie_tails:  # so that a model without it is described as it always was
            del values["tie_tails"]
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NextItNetConfig:
        """A configuration from :meth:`to_dict`. Fields that have a default may be missing.

        Raises:
            ValueError: another format version, an unknown key or a missing one.
            TypeError, ValueError: as the constructor.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"a model configuration must be a mapping, got {type(values).__name__}")
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"the model configuration has format_version {version!r}, but this cprec reads {FORMAT_VERSION}: "
                "read it with the version that wrote it, or write it again"
            )
        fields = dataclasses.fields(cls)
        _check_keys(set(values), {field.name for field in fields}, "a model configuration")
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"the model configuration lacks {', '.join(missing)}")
        for name in ("input_partition", "output_partition"):
            if not isinstance(values[name], Mapping):
                raise TypeError(f"{name} must be a mapping, got {values[name]!r}")
            try:
                values[name] = Partition.from_dict(values[name])
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
        return cls(**values)


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_keys(given: set[str], known: set[str], what: str) -> None:
    if unknown := sorted(given - known):
        raise ValueError(f"unknown keys in {what}: {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _partition(
    prefix: str, num_items: int, embedding_dim: int, cutoffs: Sequence[int | float], ranks: Sequence[int] | None
) -> Partition:
    """A partition from integer or fractional cutoffs; ``prefix`` names the arguments in messages."""
    if ranks is None:
        if cutoffs:
            example = [max(1, embedding_dim >> 2 * j) for j in range(len(cutoffs) + 1)]
            raise ValueError(
                f"{prefix}cutoffs = {list(cutoffs)} make {len(example)} clusters: "
                f"give {prefix}ranks, the columns of each, e.g. {example}"
            )
        ranks = (embedding_dim,)
    fractional = [isinstance(cutoff, float) for cutoff in cutoffs]
    if any(fractional) and not all(fractional):
        raise ValueError(f"{prefix}cutoffs = {list(cutoffs)} mix item numbers and fractions: use one kind")
    try:
        if any(fractional):
            return Partition.from_fractions(num_items, cutoffs, ranks, embedding_dim)
        return Partition(num_items, [operator.index(cutoff) for cutoff in cutoffs], ranks, embedding_dim)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{prefix}partition: {error}") from error
