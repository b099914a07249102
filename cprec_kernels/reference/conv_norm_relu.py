"""A dilated convolution over named rows, LayerNorm and ReLU, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import accumulate_dtype
from .gather_taps import gather_taps, gather_taps_backward


def kernel_rows(weight: Tensor, taps: int) -> Tensor:
    """Of a weight (channels, d, kernel size), the last taps as (channels, taps d)."""
    return weight[:, :, weight.shape[2] - taps :].transpose(1, 2).flatten(1)


def conv_norm_relu(
    input: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result (T, channels), and what its gradient needs: the rows side by side, the convolution, and (T, 2) means and
    1 / standard deviations."""
    side_by_side = gather_taps(input, rows)
    conv = side_by_side @ kernel_rows(weight, rows.shape[0]).T + bias
    wide = conv.to(accumulate_dtype(conv.dtype))
    mean = wide.mean(1)
    variance = (wide - mean[:, None]).square().mean(1)
    stats = torch.stack([mean, (variance + eps).rsqrt()], 1)
    out = torch.relu((wide - stats[:, :1]) * stats[:, 1:] * norm_weight + norm_bias)
    return out.to(conv.dtype), side_by_side, conv, stats


def conv_norm_relu_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    out: Tensor,
    side_by_side: Tensor,
    conv: Tensor,
    stats: Tensor,
    num_rows: int,
    want_input: bool = True,
    want_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias, and the norm's weight and bias, from that of the result; empty if not wanted."""
    taps, (channels, width, size), dtype = rows.shape[0], weight.shape, grad.dtype
    grad = torch.where(out > 0, grad, 0).to(stats.dtype)
    normed = (conv - stats[:, :1]) * stats[:, 1:]
    pulled = grad * norm_weight
    along = (pulled * normed).mean(1, keepdim=True)
    d_conv = stats[:, 1:] * (pulled - pulled.mean(1, keepdim=True) - normed * along)
    d_bias, d_norm_weight, d_norm_bias = (own.sum(0).to(dtype) for own in (d_conv, grad * normed, grad))
    d_conv = d_conv.to(dtype)
    d_weight, d_input = weight.new_empty(0), weight.new_empty(0)
    if want_weight:
        d_weight = weight.new_zeros(channels, width, size)
        d_weight[:, :, size - taps :] = (d_conv.T @ side_by_side).view(channels, taps, width).transpose(1, 2)
    if want_input:
        d_input = gather_taps_backward(d_conv @ kernel_rows(weight, taps), rows, num_rows)
    return d_input, d_weight, d_bias, d_norm_weight, d_norm_bias
