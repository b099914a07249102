"""NextItNet and its configuration."""

from cprec.model.config import NextItNetConfig
from cprec.model.nextitnet import NextItNet, ResidualStack

__all__ = ["NextItNet", "NextItNetConfig", "ResidualStack"]
