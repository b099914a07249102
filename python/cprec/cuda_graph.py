"""Training steps on a CUDA device in two launches: the forward and the backward of a loss, replayed from CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cprec.model import NextItNet


class GraphedLoss:
    """``model.loss`` of windows; on a CUDA device those of one shape are replayed from graphs captured at the first.

    A NextItNet's step is hundreds of kernels of a few microseconds each, and launching them takes the host far longer than
    running them takes the device. Parameters are read, and gradients handed to autograd, as without graphs: clipping,
    optimisers and seeds of dropout (by ``torch.manual_seed`` before the call) work as ever. Windows of other shapes, such as
    an epoch's last ones, on other devices, in evaluation, or of models whose gradients are sparse run as they are; so do
    all where the device has no room for a graph's own memory. Under autocast a parameter of several uses, as in shared layers, is
    cast for each and its gradients are added in fp32: a replayed step is then the more exact one, by the narrow type's rounding.

    One loss at a time: its backward pass comes before the next call, and gradients are set to None in between, since loss
    and gradients lie in memory that the next replay writes over. What a step was when it was captured it stays: autocast,
    dropout rates, which parameters are trained, hooks on modules. Another thread must not call CUDA during the capture.

    Args:
        model: stays where it is and keeps its parameters: the graphs hold their addresses.
        shape: (B, L + 1) of the windows that are worth a graph. None: no graphs, for models under DDP, whose hooks on
            gradients a graph would not know.
    """

    def __init__(self, model: NextItNet, shape: tuple[int, int] | None) -> None:
        self.shape = None if model.config.sparse_embedding else shape
        self.model = model
        self._replayed: Callable[[Tensor], Tensor] | None = None

    def __call__(self, windows: Tensor) -> Tensor:
        """The loss, a scalar. That of a replay is overwritten by the next call: copy what has to stay."""
        trains = self.model.training and torch.is_grad_enabled()
        if windows.device.type != "cuda" or windows.shape != self.shape or not trains:
            return self.model.loss(windows)
        if self._replayed is None:
            try:
                self._replayed = self._capture(windows)
            except torch.cuda.OutOfMemoryError:
                self.shape = None
                torch.cuda.empty_cache()
                warnings.warn(
                    "no memory left for CUDA graphs: training steps are launched kernel by kernel, which is slower; a "
                    "smaller batch_size may fit",
                    stacklevel=2,
                )
                return self.model.loss(windows)
        return self._replayed(windows)

    def _capture(self, windows: Tensor) -> Callable[[Tensor], Tensor]:
        device = windows.device
        # Autocast must not keep weights it has cast: the graph would read the first step's for ever. Those that it has kept
        # hold on to nodes of another stream, which a capture must not wait for.
        torch.clear_autocast_cache()
        narrow = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        # The steps that warm up draw dropout: the caller's seed is for the step that follows.
        with torch.cuda.device(device), torch.random.fork_rng(devices=[device]), narrow:
            replayed = torch.cuda.make_graphed_callables(_Loss(self.model), (windows.clone(),), allow_unused_input=True)
        # As a module it would hold itself, and with it the graphs' memory, until Python looks for cycles.
        forward = cast("Callable[[Tensor], Tensor]", replayed.forward)  # type: ignore[union-attr]
        del replayed.forward  # type: ignore[union-attr]
        return forward


class _Loss(nn.Module):
    """A model's loss as a module's forward, which is what torch captures."""

    def __init__(self, model: NextItNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> Tensor:
        return self.model.loss(windows)
