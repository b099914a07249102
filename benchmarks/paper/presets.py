"""How much of the paper's tables is run: ``full`` answers, ``core`` answers for one length, ``quick`` shows that everything
works, ``tiny`` is for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

LARGE = 20_000  # items: with fewer, the blocks are a large part of a model and rare items are few
Settings = dict[str, float | str]  # chosen for a model and its training: values of the grid, "init"
SHARINGS = ("none", "cross-layer", "cross-block", "adjacent-layer", "adjacent-block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """One way to run the tables.

    Args:
        dim, dilations, repeats: of every NextItNet. batch_size, epochs, patience: of every training run.
        seeds: the first one also tunes. lengths: L in table 1, main_length in all others. recbole: whether table 1 has
            RecBole's NextItNet at main_length, of the first seed: an hour and a half on a CPU.
        compression, small_compression: that the planner is asked for, for catalogues of more than LARGE items and for
            others.
        grid: values to try per setting ("dropout", "learning_rate", "weight_decay"), one setting after the other, the
            first value of each to begin with; chosen by validation NDCG@10, for every model alike.
        sharings, clusters, compressions, small_compressions: of tables 2 and 3; the last two beside those above.
        both_tables: table 2 without block decomposition too.
        wide_dim, wide_patience, wide_lengths, wide_sharing: of table 6, which is not run without lengths. Its partition is
            planned for the layers that are shared.
        factor_lengths, factor_smoothing, factor_items: of table 7, which is not run without lengths, nor for catalogues of
            at most so many items: the models of table 6 once more, with item vectors from factors and this label smoothing.
        sizes: catalogues of table 5. rounds, search_rounds: timed steps and searches per contender.
    """

    name: str
    dim: int = 64
    dilations: tuple[int, ...] = (1, 4)
    repeats: int = 2
    batch_size: int = 128
    epochs: int
    patience: int
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    main_length: int = 20
    recbole: bool = True
    compression: float
    small_compression: float = 2.0
    grid: dict[str, tuple[float, ...]]
    sharings: tuple[str, ...]
    both_tables: bool
    clusters: tuple[int, ...]
    compressions: tuple[float, ...] = ()
    small_compressions: tuple[float, ...] = ()
    wide_dim: int = 128
    wide_patience: int = 8
    wide_lengths: tuple[int, ...] = ()
    wide_sharing: str = "adjacent-block"
    factor_lengths: tuple[int, ...] = ()
    factor_smoothing: float = 0.3
    factor_items: int = LARGE
    sizes: tuple[int, ...]
    rounds: int
    search_rounds: int

    def compression_for(self, num_items: int) -> float:
        """What the planner is asked for a catalogue of so many items."""
        return self.compression if num_items > LARGE else self.small_compression

    def other_compressions_for(self, num_items: int) -> tuple[float, ...]:
        """What else table 3 asks it."""
        return self.compressions if num_items > LARGE else self.small_compressions

    def wide(self) -> Preset:
        """The preset with the width and the patience of tables 6 and 7."""
        return dataclasses.replace(self, dim=self.wide_dim, patience=self.wide_patience, lengths=self.wide_lengths)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


# A step of the uncompressed twin on Amazon Beauty takes half a second on two cores and its epoch over two minutes: one epoch
# of few models is what fifteen minutes hold.
QUICK = Preset(
    name="quick",
    epochs=1,
    patience=0,
    seeds=(0,),
    lengths=(20,),
    compression=6.0,
    grid={"dropout": (0.2,), "learning_rate": (1e-3,), "weight_decay": (0.01,)},
    sharings=("none", "adjacent-block"),
    both_tables=False,
    clusters=(1, 3),
    recbole=False,
    sizes=(10_000, 100_000, 1_000_000),
    rounds=5,
    search_rounds=30,
)
FULL = Preset(
    name="full",
    epochs=60,
    patience=4,
    seeds=(0, 1, 2),
    lengths=(10, 20, 50, 100),
    compression=6.0,
    # The learning rate comes first: the better one takes a third of the other's epochs, and all further runs use it.
    grid={"learning_rate": (1e-3, 3e-3), "dropout": (0.2, 0.5), "weight_decay": (0.01,)},
    sharings=SHARINGS,
    both_tables=True,
    clusters=(1, 3),
    compressions=(4.0,),
    small_compressions=(1.5,),
    wide_lengths=(20, 50),
    factor_lengths=(20,),
    sizes=(10_000, 100_000, 1_000_000, 10_000_000),
    rounds=20,
    search_rounds=200,
)
# Every run of it is one of the full preset's, which therefore goes on from there.
CORE = dataclasses.replace(FULL, name="core", lengths=(20,), both_tables=False, wide_lengths=(20,))
TINY = Preset(
    name="tiny",
    dim=8,
    dilations=(1,),
    repeats=1,
    epochs=1,
    patience=0,
    seeds=(0, 1),
    lengths=(4,),
    main_length=4,
    compression=1.3,
    small_compression=1.3,
    grid={"dropout": (0.0, 0.2), "learning_rate": (1e-3,), "weight_decay": (0.01,)},
    sharings=("none", "cross-block"),
    both_tables=True,
    clusters=(1, 2),
    small_compressions=(1.1,),
    wide_dim=16,
    wide_patience=0,
    wide_lengths=(4,),
    factor_lengths=(4,),
    factor_items=0,
    sizes=(300, 600),
    rounds=2,
    search_rounds=2,
)
PRESETS = {preset.name: preset for preset in (QUICK, CORE, FULL, TINY)}
