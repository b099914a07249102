"""cprec::gather_taps: against the fp64 reference and against slices, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from cprec_kernels import functional, use_backend
from cprec_kernels.reference import gather_taps as reference
from cprec_kernels.testing import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(num_rows=23, tokens=150, taps=3, width=17, dtype=torch.float32):
    """Rows drawn with repetition, so that some are met often and some never; a fifth are none."""
    rows = torch.randint(num_rows + 1, (taps, tokens))
    rows[torch.rand(taps, tokens) < 0.2] = num_rows
    return torch.randn(num_rows, width).to(dtype).requires_grad_(), rows


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """The kernel has one form for all instruction sets."""
    with use_backend(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [{}, {"width": 128, "tokens": 1000, "num_rows": 900}, {"taps": 1}, {"num_rows": 1}, {"width": 1}]
)
def test_rows_and_their_gradient(dtype, sizes, backend, poison):
    x, rows = make(dtype=dtype, **sizes)
    out = functional.gather_taps(x, rows)
    wide = x.detach().double().requires_grad_()
    expected = reference.gather_taps(wide, rows)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0)
    grad = torch.randn_like(out)
    out.backward(grad)
    (exact,) = torch.autograd.grad(expected, wide, grad.double())
    torch.testing.assert_close(exact, reference.gather_taps_backward(grad.double(), rows, len(x)))
    if dtype == torch.float64:
        torch.testing.assert_close(x.grad, exact)
    else:
        assert_accurate(x.grad, reference.gather_taps_backward(grad, rows, len(x)), exact, dtype)


def test_taps_are_rows_side_by_side():
    x = torch.arange(8.0).view(4, 2)
    rows = torch.tensor([[4, 0, 1], [3, 3, 4]])
    out = functional.gather_taps(x, rows)
    assert out.tolist() == [[0, 0, 6, 7], [0, 1, 6, 7], [2, 3, 0, 0]]


@pytest.mark.parametrize(("num_rows", "tokens", "width"), [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_nothing(num_rows, tokens, width, backend, poison):
    x = torch.randn(num_rows, width, requires_grad=True)
    out = functional.gather_taps(x, torch.full((2, tokens), num_rows))
    assert torch.equal(out, torch.zeros(tokens, 2 * width))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_rows_that_do_not_lie_side_by_side_in_memory():
    x, rows = make()
    strided = torch.stack([x.detach(), x.detach()], 2)[:, :, 0]
    grad = torch.randn(17 * 3, rows.shape[1]).T
    assert not strided.is_contiguous()
    assert not grad.is_contiguous()
    for own in (rows, rows.T.contiguous().T):
        out = functional.gather_taps(strided.requires_grad_(), own)
        torch.testing.assert_close(out, functional.gather_taps(x, rows), rtol=0, atol=0)
    (found,) = torch.autograd.grad(out, strided, grad)
    torch.testing.assert_close(found, reference.gather_taps_backward(grad, rows, len(x)))


def test_threads_change_no_bit():
    x, rows = make(num_rows=700, tokens=2000, width=64)
    grad, threads, found = torch.randn(2000, 3 * 64), torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(torch.autograd.grad(functional.gather_taps(x, rows), x, grad)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(own, found[0]) for own in found)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, rows: (x, rows.int()), TypeError, "rows must be int64"),
        (lambda x, rows: (x, rows[0]), ValueError, r"rows must be \(taps, T\)"),
        (lambda x, rows: (x, rows[:0]), ValueError, "at least one tap"),
        (lambda x, rows: (x[0], rows), ValueError, r"input must be \(N, d\)"),
        (lambda x, rows: (x, rows.index_fill(1, torch.tensor(7), 24)), IndexError, r"rows\[0, 7\] = 24 is outside 0..23"),
        (lambda x, rows: (x, rows.index_fill(1, torch.tensor(7), -1)), IndexError, r"rows\[0, 7\] = -1 is outside 0..23"),
    ],
)  # fmt: skip
def test_refusals(change, error, message, direct, backend):
    call = functional.gather_taps if direct else torch.ops.cprec.gather_taps
    with pytest.raises(error, match=message):
        call(*change(*make()))


def test_backward_refuses_what_does_not_fit(backend):
    _, rows = make()
    for grad in (torch.ones(150, 50), torch.ones(149, 51), torch.ones(51)):
        with pytest.raises(ValueError, match="does not fit rows of shape"):
            torch.ops.cprec.gather_taps_backward(grad, rows, 23)
    with pytest.raises(IndexError, match=r"outside 0\.\.5"):
        torch.ops.cprec.gather_taps_backward(torch.ones(150, 51), rows, 5)


def test_not_twice_differentiable():
    x, rows = make()
    (grad,) = torch.autograd.grad(functional.gather_taps(x, rows).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(torch.ops.cprec.gather_taps(x, rows).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_and_compiled(dtype):
    x, rows = make(dtype=dtype)
    torch.library.opcheck(torch.ops.cprec.gather_taps.default, (x, rows))
    torch.library.opcheck(torch.ops.cprec.gather_taps_backward.default, (torch.randn(150, 51, dtype=dtype), rows, 23))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(functional.gather_taps, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x, rows)
    compiled.square().sum().backward()
    assert ["gather_taps.default" in code for code in graphs] == [True, False]
    assert ["gather_taps_backward.default" in code for code in graphs] == [False, True]
    eager = functional.gather_taps(x, rows)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    torch.testing.assert_close(x.grad, torch.autograd.grad(eager.square().sum(), x)[0])


def test_gradcheck():
    with use_backend("reference"):
        x, rows = make(num_rows=4, tokens=5, width=2, dtype=torch.float64)
        torch.autograd.gradcheck(functional.gather_taps, (x, rows))
