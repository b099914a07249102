"""Item vectors from interactions alone: which item follows which, factorised (implicit ALS). It takes about as long as an
epoch, and a model that starts from such vectors needs a fraction of the epochs (docs/accuracy.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cprec.progress import progress_bar
from cprec_kernels.convert import set_item_vectors

if TYPE_CHECKING:
    from cprec.data import PreparedData, Sequences
    from cprec.model import NextItNet

SWEEPS = 5
CG_STEPS = 3
MAX_ENTRIES = 1 << 20  # numbers in a batch of partners' vectors: 4 MB, which caches hold in part
ROWS_IN_FP64 = 1 << 14  # at a time
SMALLEST = 1e-30  # of what divides: a system that is solved already


class Transitions(NamedTuple):
    """How often an item comes soon after another: n pairs, none twice, sorted by ``previous`` and then ``following``.

    Attributes:
        previous, following: (n,) int64 items. weights: (n,) float32, above 0.
    """

    previous: Tensor
    following: Tensor
    weights: Tensor

    def reversed(self) -> Transitions:
        """The same pairs the other way round."""
        order = torch.argsort(self.following, stable=True)
        return Transitions(self.following[order], self.previous[order], self.weights[order])


def transitions(
    sequences: Sequences, num_items: int, *, window: int = 5, decay: float = 0.7, backward: float = 0.5
) -> Transitions:
    """Count which items come after which.

    An item m places behind another of its sequence, m = 1..window, adds decay^(m - 1) to the pair, and ``backward`` times as
    much to the pair the other way round: what belongs together often comes in either order. An item after itself adds
    nothing. Memory: up to 100 bytes per interaction and place of the window, where nearly all pairs differ.

    Raises:
        ValueError: an argument outside its range, or items that are none of 0..num_items - 1.
    """
    _check("window", window, window >= 1, "at least 1")
    _check("decay", decay, 0 < decay <= 1, "above 0 and at most 1")
    _check("backward", backward, 0 <= backward < math.inf, "at least 0")
    compact = sequences.compact()
    items = torch.from_numpy(compact.items.astype(np.int64))
    _check_items("sequences", items, num_items)
    owner = torch.from_numpy(np.repeat(np.arange(len(compact)), compact.lengths))
    keys, weights = [items.new_zeros(0)], [torch.zeros(0)]
    for lag in range(1, min(window, len(items) - 1) + 1):
        earlier, later = items[:-lag], items[lag:]
        counts = (owner[:-lag] == owner[lag:]) & (earlier != later)
        earlier, later = earlier[counts], later[counts]
        for first, second, weight in ((earlier, later, 1.0), (later, earlier, backward)):
            if weight:
                keys.append(first * num_items + second)
                weights.append(torch.full(first.shape, weight * decay ** (lag - 1)))
    pairs, place = torch.cat(keys).unique(return_inverse=True)
    total = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, place, torch.cat(weights).double())
    return Transitions(pairs // num_items, pairs % num_items, total.float())


def factorise(
    pairs: Transitions,
    num_items: int,
    width: int,
    *,
    sweeps: int = SWEEPS,
    unobserved: float = 12.0,
    regularisation: float = 0.4,
    seed: int = 0,
    advance: Callable[[int], None] = lambda sweeps: None,
) -> tuple[Tensor, Tensor]:
    """Vectors p of items as histories and q of items as what comes next, by implicit ALS.

    With c_ij from ``pairs``, 0 for others, l for ``regularisation`` and a for ``unobserved`` times the mean of c_ij over all
    K^2 pairs (so that it does not depend on how dense they are), alternately over p and q minimises

        sum_ij c_ij (1 - p_i q_j)^2 + a sum_ij (p_i q_j)^2 + l sum_i (c_i + a K)^(1/2) |p_i|^2 + the same for q_j,

    c_i being the sum of c_ij over j (Hu, Koren and Volinsky, ICDM 2008; regularisation by frequency: Rendle et al., RecSys
    2022, section 3.2, with an exponent between their 0 and 1, which suits sparse and dense data alike). Each row takes a few
    steps of conjugate gradients from where it was (Takacs, Pilaszy and Tikk, RecSys 2011), 16 width FLOPs per pair and 8
    width^2 per item a sweep and side.

    Args:
        pairs: of items 0..K-1. num_items: K. width: numbers per vector.
        seed: of the vectors to begin with. advance: called with 1 after every sweep.

    Returns:
        p and q, (K, width) fp32; 0 for items in no pair.

    Raises:
        ValueError: an argument outside its range, or pairs of other items.
    """
    for name, count in (("num_items", num_items), ("width", width), ("sweeps", sweeps)):
        _check(name, count, count >= 1, "at least 1")
    for name, value in (("unobserved", unobserved), ("regularisation", regularisation)):
        _check(name, value, 0 < value < math.inf, "above 0 and finite")
    for name, items in (("pairs.previous", pairs.previous), ("pairs.following", pairs.following)):
        _check_items(name, items, num_items)
    generator = torch.Generator().manual_seed(seed)
    after = torch.randn(num_items, width, generator=generator).mul_(0.1 * width**-0.5)
    before = torch.zeros(num_items, width)
    least = unobserved * float(pairs.weights.double().sum()) / num_items**2
    onward, backward = (_Side(side, num_items, least, regularisation) for side in (pairs, pairs.reversed()))
    for _ in range(sweeps):
        onward.improve(before, after)
        backward.improve(after, before)
        advance(1)
    return before, after


def _check(name: str, value: float, fits: bool, range_: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {range_}, got {value}")


def _check_items(name: str, items: Tensor, num_items: int) -> None:
    bad = (items < 0) | (items >= num_items)
    if bad.any():
        raise ValueError(f"{name} holds item {int(items[bad][0])}, outside 0..{num_items - 1}")


class _Side:
    """The pairs by the first of their items, and what the objective says of its vector."""

    def __init__(self, pairs: Transitions, num_items: int, least: float, regularisation: float) -> None:
        self.pairs, self.least = pairs, least
        self.degrees = torch.bincount(pairs.previous, minlength=num_items)
        self.starts = self.degrees.cumsum(0) - self.degrees
        mass = torch.bincount(pairs.previous, pairs.weights.double(), minlength=num_items)
        self.penalties = (regularisation * (mass + least * num_items).sqrt()).float()

    def improve(self, rows: Tensor, partners: Tensor) -> None:
        """Bring ``rows`` (K, width) near to what is best for the partners' rows (K, width)."""
        gram = self.least * (partners.T @ partners)
        rows[self.degrees == 0] = 0.0
        for batch in self._batches(rows.shape[1]):
            places = torch.arange(int(self.degrees[batch].max()))
            inside = places < self.degrees[batch, None]
            entries = torch.where(inside, self.starts[batch, None] + places, 0)
            near = partners[self.pairs.following[entries]]  # (b, most partners, width)
            weights = self.pairs.weights[entries] * inside
            system = _System(near, weights, gram, self.penalties[batch, None])
            rows[batch] = system.conjugate_gradients(rows[batch], CG_STEPS)

    def _batches(self, width: int) -> Iterator[Tensor]:
        """Items that have partners, in batches of about as many partners each, which padding to the most makes no larger
        than MAX_ENTRIES (but for a batch of one item)."""
        order = torch.argsort(self.degrees, descending=True, stable=True)
        order = order[: int((self.degrees > 0).sum())]
        most = self.degrees[order].tolist()
        lo = 0
        while lo < len(order):
            hi = lo + max(1, MAX_ENTRIES // (width * most[lo]))
            yield order[lo:hi]
            lo = hi


class _System(NamedTuple):
    """For each of b items the equations (N^T W N + G + l I) x = N^T w of its vector x.

    Attributes:
        near: N (b, m, width). weights: w (b, m). gram: G (width, width). penalties: l (b, 1).
    """

    near: Tensor
    weights: Tensor
    gram: Tensor
    penalties: Tensor

    def product(self, x: Tensor) -> Tensor:
        scores = torch.bmm(self.near, x[:, :, None])[:, :, 0] * self.weights
        return torch.bmm(scores[:, None], self.near)[:, 0] + x @ self.gram + self.penalties * x

    def conjugate_gradients(self, start: Tensor, steps: int) -> Tensor:
        """(b, width) after some steps from (b, width)."""
        x = start.clone()
        residual = torch.bmm(self.weights[:, None], self.near)[:, 0] - self.product(x)
        direction = residual.clone()
        square = residual.square().sum(1, keepdim=True)
        for _ in range(steps):
            image = self.product(direction)
            step = square / (direction * image).sum(1, keepdim=True).clamp_min(SMALLEST)
            x += step * direction
            residual -= step * image
            before, square = square, residual.square().sum(1, keepdim=True)
            direction = residual + square / before.clamp_min(SMALLEST) * direction
        return x


def as_initial_vectors(before: Tensor, after: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in a model's scale: the mean square norm of p is 1 and the standard deviation of p_i q_j is 1, for i drawn as
    often as it occurs and j from the catalogue. Factors that are 0 throughout stay so."""
    shares = counts.double() / counts.sum()
    width = before.shape[1]
    mean_p, mean_q = torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    square_p, square_q = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    for part in torch.arange(len(before)).split(ROWS_IN_FP64):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        p, q, weights = before[rows].double(), after[rows].double(), shares[rows]
        mean_p += weights @ p
        square_p += (p * weights[:, None]).T @ p
        mean_q += q.sum(0) / len(after)
        square_q += q.T @ q / len(after)
    norm = float(square_p.trace().sqrt()) or 1.0
    deviation = float(((square_p * square_q).sum() - (mean_p @ mean_q).square()).clamp_min(0).sqrt()) or norm
    return before / norm, after * (norm / deviation)


def initialise(model: NextItNet, data: PreparedData, *, seed: int = 0, progress: bool = False) -> None:
    """Have a new model start from item vectors of its training data. ``progress``: a bar on standard error, on a terminal."""
    num_items, width = model.config.num_items, model.config.embedding_dim
    with progress_bar("factorising transitions", SWEEPS, progress) as advance:
        before, after = factorise(transitions(data.train, num_items), num_items, width, seed=seed, advance=advance)
    counts = torch.from_numpy(np.asarray(data.counts, dtype=np.float64))
    before, after = as_initial_vectors(before, after, counts)
    if model.config.tie_tails:
        set_item_vectors(model.softmax, counts, inputs=before, outputs=after)
        return
    set_item_vectors(model.embedding, counts, inputs=before)
    set_item_vectors(model.softmax, counts, outputs=after)
