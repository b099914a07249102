"""What a partition is expected to lose: a surrogate for accuracy that needs item counts alone.

Item i was seen n_i times; its weight is w_i = (n_i + 1) / (N + K), its share of interactions with one more for every
item, so that items nobody has seen yet still count. A partition that gives it r of d columns loses the share

    l_i = min(1, T(r) + v * 2 r / (n_i + 1) + t [i in a tail] + u [one row serves both tables])

of what can be known of it, and the loss of the partition is sum_i w_i l_i, between 0 and about 1.

* T(r) is the share of the embedding's variance beyond its first r directions, for a spectrum that falls as a power,
  variance k^-a in direction k = 1..d. (Bias.)
* 2 r numbers, a row in the input table and one in the softmax, are estimated from n_i observations; each costs v / n_i, as
  in the penalties of AIC and Mallows' C_p; r numbers where one row serves both. (Variance.) Projections and parent labels
  are numbers too: v / (N + K) each.
* t is what the two-level softmax costs an item that is reached through its parent label: one vector per tail has to say
  how probable the whole tail is.
* u is what it costs that one row has to be the item as a history and the item as a target. It buys twice the columns.
* The minimum says that an item cannot lose more than there is: past that, more columns do no further harm.

The docs (docs/planning.md) say where the four constants come from and what they reproduce. They are no prediction of a
metric: they order partitions of the same data.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cprec_kernels.planning.counts import FloatArray, Popularity


@dataclasses.dataclass(frozen=True)
class QualityModel:
    """Constants of the surrogate.

    Args:
        spectrum: a, exponent of the variance of an embedding's directions.
        noise: v, loss per estimated number and observation.
        tree: t, loss of an item that lies in a tail.
        tied: u, loss of an item whose one row serves both tables.
    """

    spectrum: float = 0.75
    noise: float = 0.02
    tree: float = 0.02
    tied: float = 0.15

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} must be a finite number of at least 0, got {value}")

    def lost_variance(self, ranks: FloatArray, width: int) -> FloatArray:
        """T(r) for every rank (...) in 1..width."""
        energy = np.cumsum(np.arange(1, width + 1, dtype=np.float64) ** -self.spectrum)
        lost: FloatArray = 1.0 - energy[ranks.astype(np.int64) - 1] / energy[-1]
        return lost

    def item_losses(
        self, popularity: Popularity, ranks: FloatArray, width: int, tail: bool, tied: bool = False
    ) -> FloatArray:
        """w_i l_i of an item in every run, for every rank: (ranks, runs). ``tied``: one row serves both tables."""
        seen = popularity.values + 1.0
        rows = 1.0 if tied else 2.0
        lost = self.lost_variance(ranks, width)[:, None] + self.noise * rows * ranks[:, None] / seen
        if tail:
            lost = lost + self.tree
        if tied:
            lost = lost + self.tied
        losses: FloatArray = np.minimum(1.0, lost) * seen / self.observations(popularity)
        return losses

    def shared_loss(self, popularity: Popularity, parameters: FloatArray) -> FloatArray:
        """Loss of numbers that no single item owns: projections and parent labels, of both sides together."""
        loss: FloatArray = self.noise * parameters / self.observations(popularity)
        return loss

    @staticmethod
    def observations(popularity: Popularity) -> float:
        """N + K."""
        return popularity.total + popularity.num_items
