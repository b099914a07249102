"""Batches without their padding: the items of all sequences one below the other, for layers that need not know places.

A window of 20 places holds five items on a catalogue such as Amazon Beauty. Only the dilated taps look at other places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cprec_kernels.functional import gather_taps


class Packing:
    """Where the T items of a padded batch (B, L) lie.

    Args:
        is_item: (B, L) bool; its items are counted, which waits for the device.

    Attributes:
        tokens: (T,) int64, the place of every item in the flattened batch, ascending.
    """

    def __init__(self, is_item: Tensor) -> None:
        self.shape = is_item.shape
        flat = is_item.flatten()
        self.tokens = flat.nonzero().squeeze(1)
        nowhere = self.tokens.numel()
        self._token_at = torch.where(flat, flat.cumsum(0) - 1, nowhere).view(self.shape)
        self._found: dict[int, Tensor] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    def where_possible(cls, is_item: Tensor) -> Packing | None:
        """None on devices other than the CPU, and while torch compiles, traces or computes shapes alone, which wants shapes
        that do not depend on values. On the CPU packed batches are faster even where they hold no padding."""
        shapes_alone = torch.compiler.is_compiling() or is_traced() or type(is_item) is not Tensor
        if shapes_alone or is_item.device.type != "cpu" or not is_item.numel():
            return None
        return cls(is_item)

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        return x.flatten(0, 1).index_select(0, self.tokens)

    def unpack(self, x: Tensor) -> Tensor:
        """(T, d) -> (B, L, d) with zeros at padding."""
        return _with_nothing(x).index_select(0, self._token_at.flatten()).view(*self.shape, x.shape[1])

    def last(self, x: Tensor) -> Tensor:
        """(T, d) -> (B, d), the rows of every sequence's last place; zeros where that is padding."""
        return _with_nothing(x).index_select(0, self._token_at[:, -1])

    def before(self, lags: Sequence[int], x: Tensor) -> Tensor:
        """(T, d) -> (T, taps d): the rows so many places earlier, side by side; zeros where no item is there."""
        return gather_taps(x, self.rows(lags))

    def rows(self, lags: Sequence[int]) -> Tensor:
        """(taps, T): the tokens so many places before every token, T where none is."""
        key = tuple(lags)
        if key not in self._rows:
            self._rows[key] = torch.stack([self._token(lag) for lag in lags])
        return self._rows[key]

    def _token(self, lag: int) -> Tensor:
        """(T,): the token ``lag`` places before every token, T where none is."""
        if lag not in self._found:
            shifted = F.pad(self._token_at, (lag, -lag), value=self.tokens.numel())
            self._found[lag] = shifted.flatten().index_select(0, self.tokens)
        return self._found[lag]


def is_traced() -> bool:
    """Whether torch.jit.trace records what runs, for other shapes and values too."""
    return bool(torch._C._get_tracing_state())


def _with_nothing(x: Tensor) -> Tensor:
    """One more row, of zeros, for what is not there."""
    return F.pad(x, (0, 0, 0, 1))
