"""The tolerance rule: an error is judged against the error of plain PyTorch in the same dtype, never on its own.

truth is the reference in fp64, base the reference in the tested dtype, and ours must satisfy
``err(ours) <= 2 err(base) + EPS[dtype]``, errors being norms relative to truth's norm. The rule is that of
apple/ml-cross-entropy's tests; there is one table of EPS and nothing loosens it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# About two units in the last place of a sum's result.
EPS = {torch.float64: 1e-14, torch.float32: 2.5e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FEW = 32  # numbers, below which a tensor's error is not judged by itself where others of its kind are at hand


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of ``truth`` (fp64); infinite where one is NaN or inf and the other is not."""
    if value.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} against {tuple(truth.shape)}")
    device = truth.device if truth.device == value.device else "cpu"
    value, truth = value.detach().to(device, torch.float64), truth.detach().to(device, torch.float64)
    finite = truth.isfinite()
    if not torch.equal(value.isfinite(), finite) or not torch.equal(value[~finite], truth[~finite]):
        return math.inf
    value, truth = value[finite], truth[finite]
    norm = float(truth.norm())
    difference = float((value - truth).norm())
    return difference / norm if norm > 0 else difference


def assert_accurate(ours: Tensor, base: Tensor, truth: Tensor, dtype: torch.dtype, name: str = "result") -> None:
    """Assert the tolerance rule. ``dtype`` is the one the computation ran in, whatever the result is stored in."""
    error, base_error = relative_error(ours, truth), relative_error(base, truth)
    if not math.isfinite(base_error):
        raise ValueError(f"{name}: the reference in {dtype} is not finite where the truth is, or the other way round")
    bound = 2 * base_error + EPS[dtype]
    if not error <= bound:
        raise AssertionError(
            f"{name}: error {error:.3e} against fp64 exceeds {bound:.3e} = 2 x {base_error:.3e} (reference in {dtype})"
            f" + {EPS[dtype]:.1e}"
        )


def assert_all_accurate(
    ours: Sequence[Tensor], base: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype, name: str = "results"
) -> None:
    """Assert the tolerance rule for each of several tensors that has at least FEW numbers, and for all of them as one.

    Whether the sums behind three numbers cancel is luck, and it differs between machines.
    """
    for i, (x, y, z) in enumerate(zip(ours, base, truth, strict=True)):
        if x.shape != z.shape:
            raise AssertionError(f"{name}[{i}]: shape {tuple(x.shape)}, expected {tuple(z.shape)}")
        if z.numel() >= FEW:
            assert_accurate(x, y, z, dtype, f"{name}[{i}]")
    if ours:
        x, y, z = (torch.cat([tensor.detach().flatten() for tensor in group]) for group in (ours, base, truth))
        assert_accurate(x, y, z, dtype, f"all {name}")


def assert_same_items(items: Tensor, scores: Tensor, log_prob: Tensor, band: float) -> None:
    """Assert that (rows, k) items are the best of ``log_prob`` (rows, K) in order, up to ties closer than ``band``.

    ``log_prob`` is the truth in fp64 with -inf at items that are not allowed. An item may stand in another's place only
    where their true scores differ by less than ``band``; -1 must stand where nothing is left.
    """
    rows, k = items.shape
    expected = log_prob.sort(dim=1, descending=True, stable=True)
    best, wanted = expected.values[:, :k], expected.indices[:, :k]
    for row in range(rows):
        got = items[row]
        left = best[row] > -math.inf
        if not torch.equal(got >= 0, left):
            raise AssertionError(f"row {row}: items {got.tolist()} where {int(left.sum())} are left")
        kept = got[left]
        if kept.unique().numel() != kept.numel():
            raise AssertionError(f"row {row}: an item is returned twice: {got.tolist()}")
        own = log_prob[row, kept]
        wrong = (kept != wanted[row][left]) & ((own - best[row][left]).abs() > band)
        if wrong.any():
            place = int(wrong.nonzero()[0])
            raise AssertionError(
                f"row {row}, place {place}: item {int(kept[place])} with score {float(own[place]):.8f}, "
                f"expected {int(wanted[row][place])} with {float(best[row, place]):.8f}"
            )
        if not torch.all(scores[row, ~left] == -math.inf):
            raise AssertionError(f"row {row}: a score other than -inf where no item is left")
        if not torch.all((scores[row, left].double() - own).abs() <= band):
            raise AssertionError(f"row {row}: scores are off by more than {band}")
