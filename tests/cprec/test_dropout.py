"""The fast dropout of training on a CPU: torch's, but for the bits that it takes from the generator."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cprec.model.dropout import dropout
from cprec_kernels.reference.dropout import LEVELS


@pytest.mark.parametrize("p", [1e-3, 0.2, 0.5, 0.65, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zeros_come_with_probability_p_and_means_stay(p, dtype):
    x = torch.ones(701, 1001, dtype=dtype, requires_grad=True)
    out = dropout(x, p, True)
    kept = out != 0
    count = kept.sum(dtype=torch.float64)
    deviation = (x.numel() * p * (1 - p)) ** 0.5
    assert abs(float(count) - x.numel() * (1 - p)) < 5 * deviation + x.numel() / LEVELS
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-2, atol=0)
    out.backward(torch.full_like(out, 3.0))
    assert torch.equal(x.grad != 0, kept)
    torch.testing.assert_close(x.grad[kept], 3 * out[kept].detach())


@pytest.mark.parametrize("shape", [(0, 8), (1,), (3, 1), (5, 7), ()], ids=str)
def test_any_shape(shape):
    assert dropout(torch.ones(shape), 0.5, True).shape == shape


def test_the_default_generator_decides_and_nothing_else():
    x = torch.randn(40, 9)
    torch.manual_seed(3)
    once = dropout(x, 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, True), once)
    assert not torch.equal(dropout(x, 0.3, True), once)


def test_the_default_device_is_not_asked():
    with torch.device("meta"):
        assert dropout(torch.ones(8, device="cpu"), 0.5, True).device.type == "cpu"


def test_nothing_is_dropped_in_evaluation_or_with_p_0():
    x = torch.randn(5)
    assert dropout(x, 0.5, False) is x
    assert dropout(x, 0.0, True) is x
    assert torch.equal(dropout(x, 0.5, False, add=torch.ones(5)), 1 + x)
    assert torch.equal(dropout(x, 0.0, True, add=torch.ones(5)), 1 + x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_it_is_added_to_stays_where_it_drops(dtype):
    out = dropout(torch.ones(1000, dtype=dtype), 0.5, True, add=torch.full((1000,), 4.0, dtype=dtype))
    assert sorted(set(out.tolist())) == [4.0, 6.0]


def test_without_values_it_is_torchs():
    with FakeTensorMode():
        assert dropout(torch.ones(5), 0.5, True).shape == (5,)


def test_what_is_compiled_is_torchs():
    compiled = torch.compile(lambda x: dropout(x, 0.5, True), fullgraph=True, backend="aot_eager")
    kept = compiled(torch.ones(10_000)) != 0
    assert 4_700 < int(kept.sum()) < 5_300
