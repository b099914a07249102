"""Optimizers in the manner of ``torch.optim`` that take sparse row gradients, with exact weight decay."""

from .rowwise_adagrad import RowwiseAdagrad
from .rowwise_adamw import RowwiseAdamW

__all__ = ["RowwiseAdagrad", "RowwiseAdamW"]
