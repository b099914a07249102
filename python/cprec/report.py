"""Where the parameters of a model are, part by part, and how much smaller it is than its uncompressed twin."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich import box
from rich.table import Table

from cprec.model import NextItNet, NextItNetConfig
from cprec.model.sharing import norm_parameters, parameter_sets, set_parameters
from cprec_kernels import Partition


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One part of a model.

    Attributes:
        group: "embedding", "backbone" or "softmax".
        name, detail: which part, and its items, shape or sharing in words.
        parameters: those that this part owns; 0 where it uses another part's.
    """

    group: str
    name: str
    detail: str
    parameters: int


@dataclasses.dataclass(frozen=True)
class ParameterTable:
    """The parameters of a model, part by part.

    Attributes:
        rows: in the order of the model; their parameters add up to ``parameters``.
        bytes_per_parameter: 4 for fp32.
        twin_parameters: of the twin, the same model with a plain embedding and a plain softmax.
        unshared_twin_parameters: of the twin without layer sharing.
    """

    rows: tuple[ParameterRow, ...]
    bytes_per_parameter: int
    twin_parameters: int
    unshared_twin_parameters: int

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def total_bytes(self) -> int:
        return self.parameters * self.bytes_per_parameter

    @property
    def compression(self) -> float:
        """Parameters of the twin over parameters of this model."""
        return self.twin_parameters / self.parameters

    @property
    def unshared_compression(self) -> float:
        """Parameters of the twin without layer sharing over parameters of this model."""
        return self.unshared_twin_parameters / self.parameters

    def subtotals(self) -> dict[str, int]:
        """Parameters per group."""
        totals: dict[str, int] = {}
        for row in self.rows:
            totals[row.group] = totals.get(row.group, 0) + row.parameters
        return totals

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        size = self.bytes_per_parameter
        return {
            "rows": [
                {**dataclasses.asdict(row), "bytes": row.parameters * size, "share": row.parameters / self.parameters}
                for row in self.rows
            ],
            "groups": self.subtotals(),
            "bytes_per_parameter": size,
            "parameters": self.parameters,
            "bytes": self.total_bytes,
            "twin_parameters": self.twin_parameters,
            "twin_bytes": self.twin_parameters * size,
            "compression": self.compression,
            "unshared_twin_parameters": self.unshared_twin_parameters,
            "unshared_compression": self.unshared_compression,
        }

    def render(self) -> Table:
        """A table for ``rich.print``."""
        table = Table(box=box.SIMPLE_HEAD, show_footer=False)
        table.add_column("part")
        table.add_column("", overflow="fold")
        for heading in ("parameters", "bytes", "share"):
            table.add_column(heading, justify="right", no_wrap=True)
        groups = self.subtotals()
        for group, subtotal in groups.items():
            table.add_row(f"[bold]{group}", "", *(f"[bold]{cell}" for cell in self._cells(subtotal)))
            for row in self.rows:
                if row.group == group:
                    table.add_row(f"  {row.name}", row.detail, *self._cells(row.parameters))
            table.add_section()
        table.add_row("[bold]total", "", *(f"[bold]{cell}" for cell in self._cells(self.parameters)))
        twins = [("twin", "plain embedding and softmax", self.twin_parameters, self.compression)]
        if self.unshared_twin_parameters != self.twin_parameters:
            detail = "and no layer sharing"
            twins.append(("twin", detail, self.unshared_twin_parameters, self.unshared_compression))
        for name, detail, parameters, ratio in twins:
            count, size, _ = self._cells(parameters)
            table.add_row(name, f"{detail}: compression {ratio:.2f}x", count, size, "")
        return table

    def _cells(self, parameters: int) -> tuple[str, str, str]:
        return (
            f"{parameters:,}",
            format_bytes(parameters * self.bytes_per_parameter),
            f"{parameters / self.parameters:.1%}",
        )


def parameter_table(model: NextItNet | NextItNetConfig) -> ParameterTable:
    """Count the parameters of a model, or of a model that a configuration would make.

    Args:
        model: bytes are in the model's dtype; for a configuration, in fp32.

    Raises:
        TypeError: neither a NextItNet nor a NextItNetConfig.
    """
    if isinstance(model, NextItNet):
        config, dtype = model.config, next(model.parameters()).dtype
    elif isinstance(model, NextItNetConfig):
        config, dtype = model, torch.float32
    else:
        raise TypeError(f"expected a NextItNet or a NextItNetConfig, got {type(model).__name__}")
    rows = [*_embedding_rows(config), *_backbone_rows(config), *_softmax_rows(config)]
    twin = config.twin()
    return ParameterTable(
        tuple(rows),
        dtype.itemsize,
        twin.num_parameters,
        dataclasses.replace(twin, sharing="none").num_parameters,
    )


def format_bytes(count: int) -> str:
    """A number of bytes in B, kB, MB, GB or TB (powers of 1000)."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def _items(partition: Partition, cluster: int) -> str:
    first, last = partition.offsets[cluster], partition.offsets[cluster + 1] - 1
    return f"item {first}" if first == last else f"items {first}..{last}"


def _projections(partition: Partition, group: str) -> list[ParameterRow]:
    width = partition.embedding_dim
    return [
        ParameterRow(group, f"projection {j}", f"{partition.ranks[j]} x {width}", partition.ranks[j] * width)
        for j in partition.projected
    ]


def _embedding_rows(config: NextItNetConfig) -> list[ParameterRow]:
    partition = config.input_partition
    stored = config.input_partition.with_padding().sizes
    rows = []
    for j, (size, rank) in enumerate(zip(stored, partition.ranks, strict=True)):
        padding = " and padding" if size != partition.sizes[j] else ""
        detail = f"{_items(partition, j)}{padding}, rank {rank}"
        rows.append(ParameterRow("embedding", f"cluster {j}", detail, size * rank))
    return rows + _projections(partition, "embedding")


def _backbone_rows(config: NextItNetConfig) -> list[ParameterRow]:
    """One row per block with the parameter sets that occur in it first, and one for all LayerNorms."""
    per_set = set_parameters(config.block, config.embedding_dim, config.kernel_size)
    owner: dict[int, int] = {}
    rows = []
    for b, sets in enumerate(parameter_sets(config.num_blocks, config.block, config.sharing)):
        new = [index for index in dict.fromkeys(sets) if index not in owner]
        owner.update(dict.fromkeys(new, b))
        dilation = config.block_dilations[b]
        detail = f"dilations {dilation}, {2 * dilation}" if config.block == "residual" else f"dilation {dilation}"
        if owner[sets[0]] != b:
            detail += f", weights of block {owner[sets[0]]}"
        elif len(set(sets)) < len(sets):
            detail += ", one set of weights"
        rows.append(ParameterRow("backbone", f"block {b}", detail, len(new) * per_set))
    norms = config.num_blocks * norm_parameters(config.block, config.embedding_dim)
    return [*rows, ParameterRow("backbone", "layer norms", f"of {config.num_blocks} blocks, never shared", norms)]


def _softmax_rows(config: NextItNetConfig) -> list[ParameterRow]:
    partition = config.output_partition
    parents = partition.num_clusters - 1
    labels = f" and {parents} tail label{'s' if parents > 1 else ''}" if parents else ""
    rank = partition.ranks[0]
    detail = f"{_items(partition, 0)}{labels}, rank {rank}"
    rows = [ParameterRow("softmax", "head", detail, partition.head_size * rank)]
    for j in range(1, partition.num_clusters):
        rank = partition.ranks[j]
        detail = f"{_items(partition, j)}, rank {rank}"
        if config.tie_tails:
            detail += ", those of the embedding"
        rows.append(ParameterRow("softmax", f"tail {j}", detail, 0 if config.tie_tails else partition.sizes[j] * rank))
    rows += _projections(partition, "softmax")
    if config.head_bias:
        rows.append(ParameterRow("softmax", "head bias", "", partition.head_size))
    if config.tail_bias and parents:
        rows.append(ParameterRow("softmax", "tail biases", "", partition.num_items - partition.sizes[0]))
    return rows
