"""NextItNet (Yuan et al., "A Simple Convolutional Generative Network for Next Item Recommendation", WSDM 2019).

Item embedding, a stack of causal dilated residual blocks, and a softmax over the next item at every position.
Embedding and softmax are CpRec's (arXiv 2004.13139); with one-cluster partitions they are a plain table and softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cprec.model.config import NextItNetConfig
from cprec.model.dropout import dropout
from cprec.model.packing import Packing, is_traced
from cprec.model.sharing import parameter_sets
from cprec_kernels.functional import conv_norm_relu, residual_stack
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks

WEIGHT_STD = 0.02  # of the truncated normal that the authors' code draws convolution weights from
NORM_EPS = 1e-8  # as in the authors' code
MOST_LAG = 1 << 40  # places: no history is as long


class CausalConv(nn.Module):
    """Dilated convolution over (B, L, channels) whose output at a position depends on it and on earlier ones.

    The dilation is given to :meth:`forward`, because layers of different dilation may share one set of weights.

    Attributes:
        weight: (out_channels, in_channels, kernel_size), as in ``nn.Conv1d``; the last tap meets the current position.
        bias: (out_channels,).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights from a normal of standard deviation 0.02 cut at two deviations, biases 0."""
        nn.init.trunc_normal_(self.weight, std=WEIGHT_STD, a=-2 * WEIGHT_STD, b=2 * WEIGHT_STD)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, dilation: int = 1, packing: Packing | None = None) -> Tensor:
        """(B, L, in) to (B, L, out); with a packing (T, in) to (T, out)."""
        if packing is not None:
            return self._packed(x, dilation, packing)
        if x.device.type == "cuda":
            return self._in_one_product(x, dilation)
        # One product per tap, shifted and added: it keeps the (B, L, d) layout, and a tap that reaches past the start
        # of the sequence costs nothing. Eight layers forward and backward take 52 ms on one CPU core, conv1d 80 and
        # im2col 84 (256 x 20 x 64); 40, 53 and 48 (64 x 50 x 64); at 64 x 100 x 128 the three are level.
        taps, length = self.weight.shape[2], x.shape[1]
        out = F.linear(x, self.weight[:, :, taps - 1], self.bias)
        for tap in range(taps - 1):
            lag = (taps - 1 - tap) * dilation
            if lag < length:
                out = out + F.pad(F.linear(x[:, : length - lag], self.weight[:, :, tap]), (0, 0, lag, 0))
        return out

    def _packed(self, x: Tensor, dilation: int, packing: Packing) -> Tensor:
        lags = self.lags(dilation, packing.shape[1])
        return self._product(x if len(lags) == 1 else packing.before(lags, x), len(lags))

    def _in_one_product(self, x: Tensor, dilation: int) -> Tensor:
        """On a GPU, where what is small costs a launch: forward and backward take 11 kernels, tap by tap 36."""
        lags = self.lags(dilation, x.shape[1])
        if len(lags) > 1:
            # A trace that is to be saved takes no function of Python's.
            plain = is_traced() or not torch.is_grad_enabled()
            x = side_by_side(x, lags) if plain else TapsSideBySide.apply(x, lags)  # type: ignore[no-untyped-call]
        return self._product(x, len(lags))

    def lags(self, dilation: int, length: int) -> list[int]:
        """How many places back the taps look, those that reach a place of the window; the furthest first."""
        reach = min(self.weight.shape[2] - 1, max(length - 1, 0) // dilation)
        return [tap * dilation for tap in range(reach, -1, -1)]

    def _product(self, rows: Tensor, taps: int) -> Tensor:
        """Of rows (..., taps in) with the last so many taps."""
        kernel = self.weight[:, :, self.weight.shape[2] - taps :]
        return F.linear(rows, kernel.transpose(1, 2).flatten(1), self.bias)

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size = self.weight.shape
        return f"{in_channels}, {out_channels}, kernel_size={kernel_size}"


def side_by_side(x: Tensor, lags: Sequence[int]) -> Tensor:
    """(B, L, channels) to (B, L, taps channels): the places so many back, zeros before the first; the furthest lag first."""
    length, furthest = x.shape[1], lags[0]
    padded = F.pad(x, (0, 0, furthest, 0))
    return torch.cat([padded[:, furthest - lag : furthest - lag + length] for lag in lags], dim=2)


class TapsSideBySide(torch.autograd.Function):
    """:func:`side_by_side` with a gradient of three kernels where autograd's own takes eight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lags: Sequence[int]) -> Tensor:
        return side_by_side(x, lags)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sequence[int]], output: Tensor) -> None:
        ctx.lags = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        *earlier, own = grad.chunk(len(ctx.lags), dim=2)
        total = own.clone(memory_format=torch.contiguous_format)
        for lag, part in zip(ctx.lags, earlier, strict=False):  # the last lag is 0, the place itself
            total[:, : total.shape[1] - lag].add_(part[:, lag:])
        return total, None


class BottleneckConvs(nn.Module):
    """The three convolutions of a bottleneck block of width d: 1x1 to m = d // 2, dilated m to m, 1x1 back to d."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.down = CausalConv(width, width // 2)
        self.dilated = CausalConv(width // 2, width // 2, kernel_size)
        self.up = CausalConv(width // 2, width)

    def forward(
        self, x: Tensor, norms: Sequence[nn.Module], dilation: int, mask: Tensor | None, packing: Packing | None
    ) -> Tensor:
        """What the block adds to ``x`` (B, L, d), or (T, d) if packed, given its LayerNorms of widths d, m, m."""
        x = self.down(F.relu(norms[0](x)))
        x = self.dilated(_masked(F.relu(norms[1](x)), mask), dilation, packing)
        return _masked(self.up(F.relu(norms[2](x))), mask)


PACKABLE = (CausalConv, BottleneckConvs)  # with their subclasses, such as parametrised ones


class ResidualStack(nn.Module):
    """The residual blocks of a NextItNet, (B, L, d) to (B, L, d).

    Residual block (WSDM 2019, figure 3b): ``x + f(f(x, l), 2 l)`` with ``f(x, l) = relu(norm(conv(x, l)))``.
    Bottleneck block (figure 3a): ``x + up(dilated(down(x), l))``, LayerNorm and ReLU before each convolution.

    Attributes:
        sets: every parameter set once, :class:`CausalConv` or, for bottleneck blocks, :class:`BottleneckConvs`. Which
            layer uses which set is :func:`cprec.model.sharing.parameter_sets`.
        norms: the LayerNorms, in order of use; never shared.
    """

    def __init__(self, config: NextItNetConfig) -> None:
        super().__init__()
        width, kernel_size = config.embedding_dim, config.kernel_size
        self.block = config.block
        self.sharing = config.sharing
        self.dropout = config.dropout
        self.dilations = config.block_dilations
        self.set_of = parameter_sets(config.num_blocks, config.block, config.sharing)
        num_sets = 1 + max(index for block in self.set_of for index in block)
        if self.block == "residual":
            self.sets = nn.ModuleList(CausalConv(width, width, kernel_size) for _ in range(num_sets))
            norm_widths = [width, width]
        else:
            self.sets = nn.ModuleList(BottleneckConvs(width, kernel_size) for _ in range(num_sets))
            norm_widths = [width, width // 2, width // 2]
        self.norms = nn.ModuleList(nn.LayerNorm(size, eps=NORM_EPS) for _ in self.dilations for size in norm_widths)

    def forward(self, x: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Hidden states of the last block, in the shape of ``x``.

        Args:
            x: (B, L, d); (T, d) with ``packing``.
            mask: (B, L, 1), 1 at items and 0 at padding, in the dtype of ``x``. Where it is 0, ``x`` must be 0 and the
                result is 0, so that padding never reaches an item. None: no padding.
            packing: where the rows of ``x`` lie, if padding was left out.
        """
        branch = self._residual if self.block == "residual" else self._bottleneck
        if self._fuses(x, packing):
            branch = self._fused
        for index, dilation in enumerate(self.dilations):
            x = dropout(branch(index, dilation, x, mask, packing), self.dropout, self.training, add=x)
        return x

    def _residual(self, index: int, dilation: int, x: Tensor, mask: Tensor | None, packing: Packing | None) -> Tensor:
        for layer, set_index in enumerate(self.set_of[index]):
            conv = self.sets[set_index]
            # one that someone put in place of ours need not know of packing
            x = conv(x, dilation << layer) if packing is None else conv(x, dilation << layer, packing)
            x = _masked(F.relu(self.norms[2 * index + layer](x)), mask)
        return x

    def _fused(self, index: int, dilation: int, x: Tensor, mask: Tensor | None, packing: Any) -> Tensor:
        """:meth:`_residual` of packed rows, a layer at a time in a kernel."""
        for layer, set_index in enumerate(self.set_of[index]):
            conv: Any = self.sets[set_index]
            norm: Any = self.norms[2 * index + layer]
            rows = packing.rows(conv.lags(dilation << layer, packing.shape[1]))
            x = conv_norm_relu(x, rows, conv.weight, conv.bias, norm.weight, norm.bias, NORM_EPS)
        return x

    def _fuses(self, x: Tensor, packing: Packing | None) -> bool:
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        as_made = packing is not None and plain and self._is_as_made()
        return as_made and all(own.dtype == x.dtype for own in self.parameters())

    def _bottleneck(self, index: int, dilation: int, x: Tensor, mask: Tensor | None, packing: Packing | None) -> Tensor:
        norms = [self.norms[3 * index + i] for i in range(3)]
        branch: Tensor = self.sets[self.set_of[index][0]](x, norms, dilation, mask, packing)
        return branch

    def layers(self) -> dict[str, Any] | None:
        """Residual blocks as :func:`cprec_kernels.functional.residual_stack` takes them; None where they are others than
        this class makes: bottleneck blocks, or a part that was replaced, parametrised, hooked or given another eps."""
        if not self._is_as_made():
            return None
        # Not by attribute, which in a module is a look-up of its own each time: serving asks for all of them per call.
        sets, norms = self.sets._modules.values(), self.norms._modules.values()
        set_parameters: list[Any] = [own._parameters for own in sets if own is not None]
        norm_parameters: list[Any] = [own._parameters for own in norms if own is not None]
        return {
            "weights": [own["weight"] for own in set_parameters],
            "biases": [own["bias"] for own in set_parameters],
            "norm_weights": [own["weight"] for own in norm_parameters],
            "norm_biases": [own["bias"] for own in norm_parameters],
            "sets": [index for block in self.set_of for index in block],
            "dilations": [min(dilation, MOST_LAG) << layer for dilation in self.dilations for layer in range(2)],
            "eps": NORM_EPS,
        }

    def _is_as_made(self) -> bool:
        sets, norms = self.sets._modules.values(), self.norms._modules.values()
        return (
            self.block == "residual"
            and not _has_any_global_hook()
            and all(type(own) is CausalConv and _is_whole(own) for own in sets)
            and all(type(own) is nn.LayerNorm and own.eps == NORM_EPS and _is_whole(own) for own in norms)
        )

    def extra_repr(self) -> str:
        return f"block={self.block!r}, sharing={self.sharing!r}, dilations={self.dilations}"


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class NextItNet(nn.Module):
    """A next-item recommender over sequences of item ids, padded on the left with ``config.num_items``.

    Args:
        config: see :class:`cprec.model.NextItNetConfig`.

    Attributes:
        embedding: :class:`cprec_kernels.nn.BlockEmbedding` over ``num_items + 1`` ids, the last one padding; with
            ``config.tie_tails`` that of the softmax.
        backbone: :class:`ResidualStack`.
        softmax: :class:`cprec_kernels.nn.ClusteredSoftmaxWithLoss` over ``num_items`` items; with ``config.tie_tails`` a
            :class:`cprec_kernels.nn.TiedBlocks`.

    Every method raises TypeError for ids that are not int64 and ValueError for shapes other than the documented ones.

    Example:
        >>> model = NextItNet(NextItNetConfig.from_plan(1000, 64, [50, 200], [64, 16, 4]))
        >>> loss = model.loss(torch.randint(1000, (8, 21)))
        >>> scores, items = model.eval().topk(torch.randint(1000, (8, 20)), k=10)
    """

    def __init__(self, config: NextItNetConfig) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {
            "head_bias": config.head_bias,
            "tail_bias": config.tail_bias,
            "label_smoothing": config.label_smoothing,
        }
        self.embedding: BlockEmbedding
        self.softmax: ClusteredSoftmaxWithLoss | TiedBlocks
        if not config.tie_tails:
            self.embedding = BlockEmbedding(
                config.input_partition.with_padding(), padding_idx=config.num_items, sparse=config.sparse_embedding
            )
        self.backbone = ResidualStack(config)
        if config.tie_tails:
            self.softmax = TiedBlocks(
                config.output_partition, padding=True, tie_projections=False, tie_head=False, **options
            )
            # A part of the softmax, and a module of this model there alone: its parameters are saved and counted once.
            self.__dict__["embedding"] = self.softmax.embedding
        else:
            self.softmax = ClusteredSoftmaxWithLoss(config.embedding_dim, config.output_partition, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        """Another softmax takes the place of a tied one: its embedding, or what was that of the old one, is the model's."""
        tied = self.__dict__.get("embedding") if name == "softmax" else None
        super().__setattr__(name, value)
        if isinstance(value, TiedBlocks) and tied is not None:
            self.__dict__["embedding"] = value.embedding
        elif tied is not None:
            self.embedding = tied  # a module of this model now, with parameters to train and to save

    @property
    def padding_id(self) -> int:
        """The id that pads short histories on the left: ``num_items``."""
        return self.config.num_items

    def forward(self, items: Tensor) -> Tensor:
        """Hidden states (B, L, d) of item ids (B, L); 0 at padding."""
        _check_ids("items", items, 2)
        packing = self._packing(items != self.padding_id)
        return self._padded(items) if packing is None else packing.unpack(self._packed(items, packing))

    def _padded(self, items: Tensor) -> Tensor:  # (B, L) -> (B, L, d)
        x = self.embedding(items)
        mask = (items != self.padding_id).unsqueeze(-1).to(x.dtype)
        x = dropout(x, self.config.dropout, self.training)
        hidden: Tensor = self.backbone(x, mask)
        return hidden

    def _packed(self, items: Tensor, packing: Packing) -> Tensor:  # (B, L) -> (T, d)
        x = dropout(self.embedding(packing.pack(items)), self.config.dropout, self.training)
        hidden: Tensor = self.backbone(x, packing=packing)
        return hidden

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy of the next item over all positions that have a history, a scalar.

        Args:
            windows: (B, L + 1) int64; the model reads ``windows[:, :-1]`` and predicts ``windows[:, 1:]``. A target
                counts when neither it nor the item before it is padding.
        """
        _check_ids("windows", windows, 2)
        if windows.shape[1] < 2:
            raise ValueError(
                f"windows must hold at least 2 items per row, an input and a target, got {windows.shape[1]}"
            )
        inputs, targets = windows[:, :-1], windows[:, 1:]
        is_item = inputs != self.padding_id
        targets = targets.masked_fill(~is_item | (targets == self.padding_id), self.softmax.ignore_index)
        packing = self._packing(is_item)
        hidden = self._padded(inputs) if packing is None else self._packed(inputs, packing)
        loss: Tensor = self.softmax(hidden, targets if packing is None else packing.pack(targets)).loss
        return loss

    def topk(
        self,
        histories: Tensor,
        k: int,
        exclude: Tensor | tuple[Tensor, Tensor] | None = None,
        candidates: Tensor | None = None,
        storage: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k most probable next items, exact, without gradients. Call :meth:`eval` first if there is dropout.

        Args:
            histories: (B, L) int64, the newest item last. A row of padding alone has hidden state 0, which tells items
                apart by cluster and bias only: serve users without a history otherwise.
            exclude: items never to return: padded (B, m) int64, where negative entries and the padding id are skipped,
                so that ``histories`` itself may be given; or ``(offsets, items)`` in CSR form.
            candidates: (c,) int64, the only items to choose from.
            storage: None searches the parameters as they are; "float32", "float16", "bfloat16" or "int8" an index in
                that format, for serving on the CPU: see :class:`cprec_kernels.nn.TopKIndex`.

        Returns:
            scores (B, k) log-probabilities, descending, and items (B, k) int64; -inf and -1 where items ran out.
        """
        if isinstance(exclude, Tensor):
            _check_ids("exclude", exclude, 2)
            exclude = exclude.masked_fill(exclude == self.padding_id, -1)
        return self.softmax.topk(self._last(histories), k, exclude=exclude, candidates=candidates, storage=storage)

    def rank(self, histories: Tensor, target: Tensor) -> Tensor:
        """0-based place (B,) of the target (B,) among all items, for histories (B, L); without gradients."""
        _check_ids("target", target, 1)
        if target.shape[0] != histories.shape[0]:
            raise ValueError(f"{target.shape[0]} targets were given for {histories.shape[0]} histories")
        return self.softmax.rank(self._last(histories), target)

    def _last(self, histories: Tensor) -> Tensor:
        """Hidden state (B, d) of the newest item: left padding puts it last."""
        _check_ids("histories", histories, 2)
        if histories.shape[1] < 1:
            raise ValueError("histories have length 0: pad them on the left with num_items to length 1 or more")
        with torch.no_grad():
            if (fused := self._fused_form(histories)) is not None:
                return residual_stack(histories, self.padding_id, **fused)
            packing = self._packing(histories != self.padding_id)
            if packing is None:
                return self._padded(histories)[:, -1]
            return packing.last(self._packed(histories, packing))

    def _packing(self, is_item: Tensor) -> Packing | None:
        # Compiled or replaced parts get what they always got: shapes that do not depend on values, and a mask.
        backbone = self.backbone
        ours = type(backbone) is ResidualStack and all(isinstance(own, PACKABLE) for own in backbone.sets)
        ours = ours and all(own._compiled_call_impl is None for own in backbone.modules())
        return Packing.where_possible(is_item) if ours else None

    def _fused_form(self, histories: Tensor) -> dict[str, Any] | None:
        """What the kernel that takes histories to the hidden states of their newest items needs; None where it must not
        run: in training with dropout, under autocast or a tracer, off the CPU, and when a part is not as this class makes it."""
        embedding, backbone = self.embedding, self.backbone
        eager = histories.device.type == "cpu" and not torch.compiler.is_compiling() and not is_traced()
        as_made = type(embedding) is BlockEmbedding and type(backbone) is ResidualStack
        if not eager or not as_made or (self.training and self.config.dropout) or torch.is_autocast_enabled("cpu"):
            return None
        if _is_hooked(embedding) or _is_hooked(backbone) or (layers := backbone.layers()) is None:
            return None
        tables: list[Any] = list(embedding.embeddings._parameters.values())
        projections = list(embedding.projections._parameters.values())
        # elsewhere forward says what is where
        return {"embeddings": tables, "projections": projections, **layers} if tables[0].device.type == "cpu" else None


def _is_whole(module: nn.Module) -> bool:
    return not _is_hooked(module) and all(own is not None for own in module._parameters.values())


def _is_hooked(module: nn.Module) -> bool:
    """Whether what runs is not just the class's forward: hooks, a forward of its own, or one compiled in place."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(forward or backward or module._compiled_call_impl is not None)


def _check_ids(name: str, ids: Tensor, dim: int) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 item ids, got {ids.dtype}: convert with .long()")
    if ids.dim() != dim:
        expected = {1: "(B,)", 2: "(B, length)"}[dim]
        raise ValueError(f"{name} must have shape {expected}, got {tuple(ids.shape)}")
