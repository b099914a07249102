"""cprec::dropout: the generator's published numbers, the same mask everywhere, and its statistics."""

from __future__ import annotations

import io

import pytest
import torch

from cprec_kernels import functional, use_backend
from cprec_kernels.reference import dropout as reference
from tests.called_ops import CalledOps

SEED = 0x0123_4567_89AB_CDEF


def test_the_generator_gives_its_published_numbers():
    """Random123's known answer for counter 0 and key 0."""
    words = reference.philox(0, torch.zeros(1, dtype=torch.int64)).flatten().tolist()
    assert [f"{word:08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("shape", [(0, 8), (), (1,), (127,), (128,), (129,), (3, 1), (701, 33)], ids=str)
def test_masks_are_the_reference_s(shape, p, cpu_backend, poison):
    for seed in (0, SEED, -1, 2**63 - 1):
        x = torch.randn(shape)
        out = functional.dropout(x, p, seed)
        assert out.shape == x.shape
        assert torch.equal(out, reference.dropout(x, p, seed, None))
        add = torch.randn(shape)
        torch.testing.assert_close(functional.dropout(x, p, seed, add), add + out)


def test_words_beyond_32_bits_count():
    """Seeds that differ in their upper half, and counters, of which the upper half is another word."""
    low, high = (reference.philox(0, torch.tensor([counter])) for counter in (5, 5 + 2**32))
    assert not torch.equal(low, high)
    x = torch.ones(1000)
    assert not torch.equal(functional.dropout(x, 0.5, 1), functional.dropout(x, 0.5, 1 + 2**32))


@pytest.mark.parametrize("p", [1e-3, 0.2, 0.5, 0.65, 0.999])
def test_zeros_come_with_probability_p_and_means_stay(p, cpu_backend):
    x = torch.ones(701, 1001)
    out = functional.dropout(x, p, SEED)
    kept = out != 0
    deviation = (x.numel() * p * (1 - p)) ** 0.5
    assert abs(float(kept.double().sum()) - x.numel() * (1 - p)) < 5 * deviation + x.numel() / reference.LEVELS
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-2, atol=0)


def test_the_last_level_before_p_of_one_still_keeps_some(cpu_backend):
    kept = functional.dropout(torch.ones(1 << 20), 1 - 1e-7, 5)
    assert kept.unique().tolist() == [0.0, 65_536.0]


def test_elements_are_independent_of_their_neighbours_and_of_other_seeds():
    """Within a block of 128, between blocks, and between seeds that follow each other: by frequencies."""
    draws = torch.stack([functional.dropout(torch.ones(1 << 18), 0.5, seed) != 0 for seed in range(8)])
    signs = draws.double() * 2 - 1
    bound = 5 / (1 << 9)
    for lag in (1, 2, 3, 16, 32, 64, 127, 128, 256):
        assert (signs[:, lag:] * signs[:, :-lag]).mean(1).abs().max() < bound
    correlation = signs @ signs.T / signs.shape[1]
    assert correlation.fill_diagonal_(0).abs().max() < bound
    by_place = signs.view(8, -1, 128).mean((0, 1))
    assert by_place.abs().max() < 5 / (1 << 7)


def test_threads_change_no_bit(cpu_isa):
    x, add, threads, found = torch.randn(300, 1000), torch.randn(300, 1000), torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(functional.dropout(x, 0.3, SEED, add))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(own, found[0]) for own in found)


def test_tensors_that_are_not_contiguous(cpu_backend):
    x, add = torch.randn(50, 7), torch.randn(7, 50).T
    strided = torch.stack([x, x], 2)[:, :, 0]
    out = functional.dropout(strided, 0.3, SEED, add)
    assert torch.equal(out, functional.dropout(x, 0.3, SEED, add.contiguous()))
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_has_the_mask(dtype, cpu_backend, poison):
    x, add = (torch.randn(40, 9, dtype=dtype, requires_grad=True) for _ in range(2))
    grad = torch.randn(40, 9, dtype=dtype)
    of_x, of_add = torch.autograd.grad(functional.dropout(x, 0.3, SEED, add), (x, add), grad)
    assert torch.equal(of_x, functional.dropout(grad, 0.3, SEED))
    assert torch.equal(of_add, grad)
    (alone,) = torch.autograd.grad(functional.dropout(x, 0.3, SEED), x, grad)
    assert torch.equal(alone, of_x)
    (of_add,) = torch.autograd.grad(functional.dropout(x.detach(), 0.3, SEED, add), add, grad)
    assert torch.equal(of_add, grad)


@pytest.mark.parametrize("call", [functional.dropout, torch.ops.cprec.dropout], ids=["direct", "registered"])
def test_differentiable_any_number_of_times(call):
    x, add = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    run = lambda x, add: call(x, 0.4, SEED, add).pow(3)  # noqa: E731
    torch.autograd.gradcheck(run, (x, add))
    torch.autograd.gradgradcheck(run, (x, add))


def test_nan_is_not_hidden(cpu_backend):
    x = torch.full((64,), float("nan"))
    assert functional.dropout(x, 0.9, SEED).isnan().all()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.ones(3), 1.0, 0), ValueError, r"p = 1(\.0)? is outside 0 <= p < 1"),
        ((torch.ones(3), -0.1, 0), ValueError, r"p = -0.1 is outside 0 <= p < 1"),
        ((torch.ones(3), float("nan"), 0), ValueError, "p = nan is outside"),
        ((torch.ones(3, dtype=torch.int64), 0.5, 0), TypeError, "input must be floating point, got torch.int64"),
        ((torch.ones(3), 0.5, 0, torch.ones(4)), ValueError, r"add must be .3,?. on"),
        ((torch.ones(3), 0.5, 0, torch.ones(3).half()), TypeError, "add is ([hH]alf|torch.float16)"),
    ],
)  # fmt: skip
def test_refusals(args, error, message, direct, cpu_backend):
    with pytest.raises(error, match=message):
        (functional.dropout if direct else torch.ops.cprec.dropout)(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_and_compiled(dtype):
    x, add = (torch.randn(30, 5, dtype=dtype, requires_grad=True) for _ in range(2))
    for given in (None, add):
        torch.library.opcheck(torch.ops.cprec.dropout.default, (x, 0.3, SEED, given))
        call = lambda x, add: functional.dropout(x, 0.3, SEED, add).square().sum()  # noqa: E731
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(x, given), x)
        torch.testing.assert_close(found, torch.autograd.grad(call(x, given), x))


def test_seeds_are_compiled_once():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        lambda x, seed: functional.dropout(x, 0.3, seed), fullgraph=True, backend=lambda g, _: graphs.append(g) or g
    )
    x = torch.randn(50)
    for seed in range(10, 20):
        assert torch.equal(compiled(x, seed), functional.dropout(x, 0.3, seed))
    assert len(graphs) <= 2


def test_a_trace_can_be_saved():
    x = torch.randn(50)
    traced = torch.jit.trace(lambda x: functional.dropout(x, 0.3, SEED), x)
    torch.jit.save(traced, io.BytesIO())
    assert torch.equal(traced(x), functional.dropout(x, 0.3, SEED))


def test_a_gradient_that_nobody_wants_is_not_computed(monkeypatch):
    x, add = torch.randn(9), torch.randn(9, requires_grad=True)
    out, registered = functional.dropout(x, 0.3, SEED, add), torch.ops.cprec.dropout(x, 0.3, SEED, add)
    with CalledOps() as called:
        for own in (out, registered):
            assert torch.equal(torch.autograd.grad(own.sum(), add)[0], torch.ones(9))
    assert "dropout" not in called.names


def test_the_reference_is_the_same_function():
    x = torch.randn(100)
    with use_backend("reference"):
        expected = functional.dropout(x, 0.3, SEED)
    assert torch.equal(functional.dropout(x, 0.3, SEED), expected)
