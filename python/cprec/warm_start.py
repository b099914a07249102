"""Going on from a trained model on data that has changed since: items come, go and change their frequency.

Items are matched by their raw ids. Blocks, projections, parent labels and the rows of items that stay in their cluster
are copied. An item that changes clusters gets the row of its new cluster that is nearest to what it was; one that the
former model did not know starts as the mean of those of its cluster that it did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cprec import checkpoint
from cprec.model import NextItNet, NextItNetConfig
from cprec.ranking import pad_left
from cprec_kernels import Partition

if TYPE_CHECKING:
    import polars as pl

    from cprec.data import PreparedData

SAMPLES = 4  # hidden states per column, which a tail's log-sum-exp is fitted to
RIDGE = 1e-6  # of the mean square of a column
CHUNK = 1 << 16  # items whose vectors are there together
FREE = {"num_items", "input_partition", "output_partition", "dropout", "label_smoothing", "sparse_embedding"}


class Former(NamedTuple):
    """A trained model and the raw ids of its items, in the order of their numbers."""

    model: NextItNet
    items: Sequence[str] | pl.Series


class Carried(NamedTuple):
    """Items of both catalogues, those of them in another cluster of the softmax, those of the new one and the old one alone."""

    known: int
    moved: int
    new: int
    gone: int

    def __str__(self) -> str:
        return f"{self.known:,} items known ({self.moved:,} in another cluster), {self.new:,} new, {self.gone:,} gone"


def read_former(folder: str | os.PathLike[str]) -> Former:
    """The model of a run whose data is still there, or of an export.

    Raises:
        CheckpointError: no model there, or a damaged one.
        FileNotFoundError, ValueError: the run has no weights yet, or its data is no longer there or is other data; an export
            is damaged.
    """
    from cprec.exported import read_items
    from cprec.run_folder import RunConfig

    folder = Path(folder)
    config, sections = checkpoint.read_config(folder)
    if "export" in sections:
        return Former(checkpoint.load(folder).eval(), read_items(folder, config.num_items, sections["export"])[0])
    run = RunConfig.read(folder)
    if not (folder / checkpoint.WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"{folder} has no {checkpoint.WEIGHTS_NAME} yet: no epoch of that run has finished")
    try:
        catalogue = run.open_data().catalogue
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(
            f"{folder} does not say which item is which without its data: {error}. Or start from an export: cprec export "
            f"{folder} --data FOLDER --out MODEL"
        ) from error
    return Former(checkpoint.load(folder).eval(), catalogue.raw_ids)


def doubtful_split(folder: str | os.PathLike[str], data: PreparedData) -> str | None:
    """Why a model that starts from the one in ``folder`` may have been trained on what ``data`` holds out; None if it was not.

    Leave-one-out twice, or twice by time, hide more from the earlier model than from the later one. All other pairs do not:
    users are drawn anew for every folder, and what a cut in time hides is not each user's last. A run whose data is gone, and an
    export from before it said, do not tell.

    Raises:
        CheckpointError: no model there, or a damaged one. ValueError: a damaged configuration.
    """
    from cprec.run_folder import RunConfig

    sections = checkpoint.read_config(folder)[1]
    former = None
    if "export" in sections:
        former = sections.get("data", {}).get("split")
    else:
        run = RunConfig.read(folder)
        with contextlib.suppress(FileNotFoundError, ValueError):
            former = run.open_data().meta["options"]["split"]
    own = data.meta["options"]["split"]
    if former == own and own in ("leave-one-out", "time"):
        return None
    before = "does not say how its data was split" if former is None else f"is of data split by {former}"
    return (
        f"{os.fspath(folder)} {before}, this data is split by {own}: it may have been trained on what is held out now, and "
        "figures would flatter. Hold out alike in both, by leave-one-out or by time"
    )


def grown(config: NextItNetConfig, num_items: int, **changes: Any) -> NextItNetConfig:
    """The configuration for another number of items: cutoffs and ranks stay, the last cluster takes what is more or less.

    Args:
        changes: other fields of the configuration.

    Raises:
        ValueError: fewer items than the last cutoff.
    """
    fields: dict[str, Any] = {**changes, "num_items": num_items}
    for name in ("input_partition", "output_partition"):
        former: Partition = getattr(config, name)
        if former.cutoffs and former.cutoffs[-1] >= num_items:
            raise ValueError(
                f"the last cluster starts at item {former.cutoffs[-1]:,}, of which {num_items:,} items leave none: train "
                "a model anew"
            )
        fields[name] = Partition(num_items, former.cutoffs, former.ranks, former.embedding_dim)
    return dataclasses.replace(config, **fields)


def initialise(model: NextItNet, data: PreparedData, folder: str | os.PathLike[str], *, length: int) -> Carried:
    """Have a new model start from the one in ``folder``: see :func:`start_from`.

    Args:
        model: of the items of ``data``. length: how many items of a history it sees.

    Raises:
        CheckpointError, FileNotFoundError, ValueError: as :func:`read_former` and :func:`start_from`; or the two share no item.
    """
    former = read_former(folder)
    numbers = torch.from_numpy(data.catalogue.encode(former.items))
    old_ids = torch.full((data.num_items,), -1)
    known = numbers >= 0
    old_ids[numbers[known]] = known.nonzero()[:, 0]
    if not bool(known.any()):
        raise ValueError(
            f"none of the {len(former.items):,} items of {os.fspath(folder)} is one of {data.folder}: are raw ids, such as "
            f"{former.items[0]!r} there and {data.catalogue.decode([0])[0]!r} here, written alike?"
        )
    count = min(len(data.train), SAMPLES * model.config.embedding_dim)
    chosen = [index * (len(data.train) - 1) // max(1, count - 1) for index in range(count)]
    former_items = [old_ids[torch.from_numpy(data.train[index].astype("int64"))] for index in chosen]
    histories = [items[items >= 0].tolist() for items in former_items]
    return start_from(model, former.model, old_ids, pad_left(histories, length, former.model.padding_id))


@torch.no_grad()
def start_from(model: NextItNet, former: NextItNet, old_ids: Tensor, histories: Tensor) -> Carried:
    """Give a model the weights of another one for other items.

    Where an item moves between levels of the softmax, its log-probability there has to be made a logit here, and holds
    its tail's log-sum-exp: in the place of that stands the linear function nearest to it over the hidden states of
    ``histories``. A cluster none of whose items was known keeps its rows.

    Args:
        model: what gets them; of the same shape but for its items, with clusters of the same ranks. On the CPU.
        former: another model, on the CPU.
        old_ids: (K,) int64, the number that each item had, -1 for a new one; none twice.
        histories: (N, L) int64 items of the former model, padded on the left.

    Raises:
        ValueError: the two differ in more than items, are one, or are not on the CPU; numbers that are out of range, or
            there twice.
        IndexError: histories of other items, which are read where an item moves. Nothing has been changed then.
    """
    _check_alike(model, former)
    _check_numbers(old_ids, model.config.num_items, former.config.num_items)
    softmax, was_softmax = _softmax(model), _softmax(former)
    level, was_level = softmax.level_of(torch.arange(len(old_ids))), was_softmax.level_of(old_ids)
    known = int((old_ids >= 0).sum())
    moved = int(((old_ids >= 0) & (level != was_level)).sum())
    if moved:
        was_training = former.training
        hidden = former.eval()(histories)[:, -1]
        former.train(was_training)
        firsts = torch.tensor(former.config.output_partition.offsets[:-1]).expand(len(hidden), -1)
        was_softmax = was_softmax.around(hidden, former.softmax.score(hidden, firsts))

    model.backbone.load_state_dict(former.backbone.state_dict())
    embedding, was_embedding = _embedding(model), _embedding(former)
    _copy(embedding.bases, was_embedding.bases)
    _copy(softmax.bases, was_softmax.bases)
    parents, was_parents = (slice(own.partition.sizes[0], None) for own in (softmax, was_softmax))
    softmax.tables[0][parents] = was_softmax.tables[0][was_parents]
    if softmax.biases[0] is not None and was_softmax.biases[0] is not None:
        softmax.biases[0][parents] = was_softmax.biases[0][was_parents]
    tied = model.config.tie_tails
    for j in range(1 if tied else embedding.partition.num_clusters):
        _set_rows(j, old_ids, [embedding], [was_embedding])
    for j in range(softmax.partition.num_clusters):
        both = tied and j > 0
        uses, former_uses = ([softmax, embedding], [was_softmax, was_embedding]) if both else ([softmax], [was_softmax])
        _set_rows(j, old_ids, uses, former_uses)
    return Carried(known, moved, len(old_ids) - known, former.config.num_items - known)


@dataclasses.dataclass
class _Use:
    """A use of item rows: item i of cluster j has the vector tables[j][i] bases[j] + shifts[j], of width d.

    Attributes:
        partition: of the items. tables: (k_j or more, r_j) per cluster. bases: (r_j, d), or None for full rank.
        shifts: (d,) fp64, what the items of a cluster have in common. biases: (k_j or more,) or None.
        constants: what their biases have in common.
        unit: (d,) fp64, whose products with hidden states are as near to 1 as a vector's can be.
    """

    partition: Partition
    tables: list[Tensor]
    bases: list[Tensor | None]
    shifts: list[Tensor]
    biases: list[Tensor | None]
    constants: list[float]
    unit: Tensor

    def level_of(self, ids: Tensor) -> Tensor:
        return torch.bucketize(ids, torch.tensor(self.partition.cutoffs, dtype=torch.int64), right=True)

    def vectors(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of items (m,): (m, d) and (m,), both fp64."""
        vectors = torch.zeros(len(ids), self.partition.embedding_dim, dtype=torch.float64)
        constants = torch.zeros(len(ids), dtype=torch.float64)
        levels = self.level_of(ids)
        for j in range(self.partition.num_clusters):
            here = levels == j
            rows = ids[here] - self.partition.offsets[j]
            basis, bias = self.bases[j], self.biases[j]
            own = self.tables[j][rows].double()
            vectors[here] = (own if basis is None else own @ basis.double()) + self.shifts[j]
            constants[here] = self.constants[j] + (0.0 if bias is None else bias[rows].double())
        return vectors, constants

    def around(self, hidden: Tensor, firsts: Tensor) -> _Use:
        """Of a softmax: with shifts and constants that make an item's logit its log-probability, but for what all items
        have in common.

        Args:
            hidden: (N, d). firsts: (N, n), log-probabilities of the first item of every level. They tell its log-sum-exp.
        """
        hidden, firsts = hidden.double(), firsts.double()
        labels = self.tables[0][self.partition.sizes[0] :].double()
        if (basis := self.bases[0]) is not None:
            labels = labels @ basis.double()
        bias = self.biases[0]
        label_biases = labels.new_zeros(len(labels)) if bias is None else bias[self.partition.sizes[0] :].double()
        vectors, constants = self.vectors(torch.tensor(self.partition.offsets[:-1]))
        own = hidden @ vectors.T + constants - firsts  # (N, n): the head's log-sum-exp, and what tails add to it
        lse = own[:, 1:] - own[:, :1] + hidden @ labels.T + label_biases
        columns = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
        gram = columns.T @ columns
        inner = gram[:-1, :-1]
        inner.diagonal().add_(RIDGE * inner.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
        fitted = torch.linalg.solve(gram, columns.T @ lse)  # (d + 1, n - 1)
        return dataclasses.replace(
            self,
            shifts=[self.shifts[0], *(labels - fitted[:-1].T)],
            constants=[0.0, *(label_biases - fitted[-1]).tolist()],
            unit=torch.linalg.solve(inner, hidden.sum(0)),
        )


def _bases(partition: Partition, projections: Sequence[Tensor]) -> list[Tensor | None]:
    left = iter(projections)
    return [next(left) if j in partition.projected else None for j in range(partition.num_clusters)]


def _embedding(model: NextItNet) -> _Use:
    partition, count = model.config.input_partition, model.config.input_partition.num_clusters
    own = model.embedding
    bases = _bases(partition, list(own.projections))
    nothing = torch.zeros(partition.embedding_dim, dtype=torch.float64)
    return _Use(partition, list(own.embeddings), bases, [nothing] * count, [None] * count, [0.0] * count, nothing)


def _softmax(model: NextItNet) -> _Use:
    partition, count = model.config.output_partition, model.config.output_partition.num_clusters
    own = model.softmax.packed_weights()
    nothing = torch.zeros(partition.embedding_dim, dtype=torch.float64)
    tail_biases: Sequence[Tensor | None] = own.tail_biases or [None] * (count - 1)
    return _Use(
        partition, list(own.weights), _bases(partition, own.projections), [nothing] * count,
        [own.head_bias, *tail_biases], [0.0] * count, nothing,
    )  # fmt: skip


def _set_rows(j: int, old_ids: Tensor, uses: Sequence[_Use], former: Sequence[_Use]) -> None:
    """The rows of a cluster, which serve all of ``uses``, from what they were; biases are the first use's."""
    partition, was = uses[0].partition, former[0].partition
    lo, hi = partition.offsets[j : j + 2]
    ids = old_ids[lo:hi]
    known = ids >= 0
    if not bool(known.any()):
        return
    stays = known & (former[0].level_of(ids) == j)
    moves = known & ~stays
    table, bias = uses[0].tables[j], uses[0].biases[j]
    rows = table.new_zeros(hi - lo, table.shape[1])
    constants = torch.zeros(hi - lo, dtype=torch.float64)
    rows[stays] = former[0].tables[j][ids[stays] - was.offsets[j]].to(rows)
    if (was_bias := former[0].biases[j]) is not None:
        constants[stays] = was_bias[ids[stays] - was.offsets[j]].double()
    for places in moves.nonzero()[:, 0].split(CHUNK):
        wanted = [use.vectors(ids[places]) for use in former]
        vectors = [vectors - use.shifts[j] for (vectors, _), use in zip(wanted, former, strict=True)]
        constants[places] = wanted[0][1] - former[0].constants[j]
        if bias is None:
            vectors[0] += constants[places, None] * former[0].unit
        rows[places] = _nearest(vectors, [use.bases[j] for use in former]).to(rows)
    rows[~known], constants[~known] = rows[known].mean(0), constants[known].mean()
    table[: hi - lo] = rows
    if bias is not None:
        bias[: hi - lo] = constants.to(bias)


def _nearest(vectors: Sequence[Tensor], bases: Sequence[Tensor | None]) -> Tensor:
    """Rows (m, r) whose products with the bases (r, d) are nearest to the vectors (m, d), all bases weighing the same."""
    if bases[0] is None:
        return vectors[0]
    wide = [basis.double() for basis in bases if basis is not None]
    norms = [float(basis.norm()) or 1.0 for basis in wide]
    together, targets = (
        torch.cat([part / norm for part, norm in zip(parts, norms, strict=True)], 1) for parts in (wide, vectors)
    )
    rows: Tensor = targets @ torch.linalg.pinv(together)
    return rows


def _copy(here: Sequence[Tensor | None], there: Sequence[Tensor | None]) -> None:
    for own, other in zip(here, there, strict=True):
        if own is not None and other is not None:
            own.copy_(other)


def _check_alike(model: NextItNet, other: NextItNet) -> None:
    ours, former = model.config, other.config
    if model is other:
        raise ValueError("a model cannot start from itself: make one of the new configuration")
    for name, own in (("model", model), ("former", other)):
        if (device := next(own.parameters()).device).type != "cpu":
            raise ValueError(f"{name} is on {device}: move both to the CPU to carry weights over")
    pairs = {
        field.name: (getattr(former, field.name), getattr(ours, field.name))
        for field in dataclasses.fields(ours)
        if field.name not in FREE
    }
    for name in ("input", "output"):
        pairs[f"{name} ranks"] = tuple(getattr(config, f"{name}_partition").ranks for config in (former, ours))
    if apart := [f"{name} {there!r} there, {here!r} here" for name, (there, here) in pairs.items() if there != here]:
        raise ValueError(f"a model can start from one of the same shape alone, but these differ: {'; '.join(apart)}")


def _check_numbers(old_ids: Tensor, num_items: int, num_former: int) -> None:
    if old_ids.shape != (num_items,) or old_ids.dtype != torch.int64:
        raise ValueError(f"old_ids must be ({num_items},) int64, got {old_ids.dtype} of shape {tuple(old_ids.shape)}")
    known = old_ids[old_ids >= 0]
    if len(known) and int(known.max()) >= num_former:
        raise ValueError(f"old_ids holds item {int(known.max())}, outside 0..{num_former - 1} of the former model")
    values, counts = known.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"old_ids holds item {int(values[counts > 1][0])} more than once")
