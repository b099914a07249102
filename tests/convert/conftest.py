"""Counts and histories of the dense models' items."""

from __future__ import annotations

import pytest
import torch

from tests.convert.dense_models import ITEMS


@pytest.fixture
def counts():
    """Zipf counts in no order, with ties; id 0 is padding."""
    zipf = (1000 / torch.arange(1, ITEMS + 1)).long()
    return torch.cat([torch.tensor([12345]), zipf[torch.randperm(ITEMS)]])


@pytest.fixture
def ids():
    return torch.cat([torch.zeros(4, 2, dtype=torch.int64), torch.randint(1, ITEMS + 1, (4, 6))], 1)
