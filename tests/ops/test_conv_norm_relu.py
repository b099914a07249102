"""cprec::conv_norm_relu: against the fp64 reference and against torch's own ops, and what it refuses."""

from __future__ import annotations

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cprec_kernels import functional, use_backend
from cprec_kernels.reference import conv_norm_relu as reference
from cprec_kernels.testing import assert_accurate

NAMES = ("input", "weight", "bias", "norm_weight", "norm_bias")
INPUT, ROWS, WEIGHT, BIAS, NORM_WEIGHT, NORM_BIAS, EPS = range(7)


def make(num_rows=23, tokens=150, taps=3, width=17, channels=13, kernel_size=None, dtype=torch.float32, offset=0.0):
    """Arguments; rows are drawn with repetition, a fifth of them none. ``offset``: of the convolution from 0."""
    rows = torch.randint(num_rows + 1, (taps, tokens))
    rows[torch.rand(taps, tokens) < 0.2] = num_rows
    tensors = (
        torch.randn(num_rows, width),
        torch.randn(channels, width, kernel_size or taps) * (taps * max(width, 1)) ** -0.5,
        0.1 * torch.randn(channels) + offset,
        1 + 0.1 * torch.randn(channels),
        0.1 * torch.randn(channels),
    )
    input, *parameters = (own.to(dtype).requires_grad_() for own in tensors)
    return [input, rows, *parameters, 1e-8]


def leaves(args):
    return [own for place, own in enumerate(args) if place not in (ROWS, EPS)]


def in_double(args):
    return [
        own.detach().double().requires_grad_() if place not in (ROWS, EPS) else own for place, own in enumerate(args)
    ]


def by_torch(input, rows, weight, bias, norm_weight, norm_bias, eps):
    gathered = functional.gather_taps(input, rows)
    kernel = weight[:, :, weight.shape[2] - len(rows) :].transpose(1, 2).flatten(1)
    return F.relu(F.layer_norm(F.linear(gathered, kernel, bias), bias.shape, norm_weight, norm_bias, eps))


def through_reference(args, grad):
    """Result and gradients of the reference, in the type of its arguments."""
    own = [arg.detach() if place not in (ROWS, EPS) else arg for place, arg in enumerate(args)]
    out, *kept = reference.conv_norm_relu(*own)
    d_input, *rest = reference.conv_norm_relu_backward(
        grad, own[ROWS], own[WEIGHT], own[NORM_WEIGHT], out, *kept, len(own[INPUT])
    )
    return out, [d_input, *rest]


SIZES = (
    {},
    {"width": 128, "channels": 128, "tokens": 1000, "num_rows": 900},
    {"taps": 1},
    {"taps": 2, "kernel_size": 5},
    {"num_rows": 1},
    {"width": 1, "channels": 5},
    {"channels": 8, "tokens": 33},
    {"channels": 40, "tokens": 31},
    {"offset": 300.0},
)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_result_and_gradients(sizes, cpu_backend, poison):
    args = make(**sizes)
    out = functional.conv_norm_relu(*args)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves(args), grad)
    plain, gradients = through_reference(args, grad)
    wide = in_double(args)
    exact, exact_gradients = through_reference(wide, grad.double())
    # Where rounding decides the sign, ReLU's gradient is another: leave those out.
    same = (out > 0) == (exact > 0)
    assert same.double().mean() > 0.99
    assert_accurate(out, plain, exact, torch.float32)
    if bool(same.all()) and bool(((plain > 0) == (exact > 0)).all()):
        for own, theirs, true, name in zip(found, gradients, exact_gradients, NAMES, strict=True):
            assert own.shape == true.shape, name
            assert_accurate(own, theirs, true, torch.float32)
    # In double the equations are autograd's.
    truth = by_torch(*wide)
    torch.testing.assert_close(exact, truth)
    for own, true in zip(exact_gradients, torch.autograd.grad(truth, leaves(wide), grad.double()), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-7, atol=1e-9)


def test_gradients_are_compared():
    """The comparison above is left out where rounding decides a sign: not everywhere."""
    compared = 0
    for sizes in SIZES:
        torch.manual_seed(0)
        args = make(**sizes)
        exact = functional.conv_norm_relu(*in_double(args))
        compared += bool(((functional.conv_norm_relu(*args) > 0) == (exact > 0)).all())
    assert compared >= len(SIZES) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_take_the_reference(dtype):
    args = make(dtype=dtype)
    out = functional.conv_norm_relu(*args)
    assert out.dtype == dtype
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves(args), grad)
    expected, gradients = through_reference(args, grad)
    assert torch.equal(out, expected)
    assert all(torch.equal(own, true) and own.dtype == dtype for own, true in zip(found, gradients, strict=True))


@pytest.mark.parametrize(("num_rows", "tokens"), [(0, 5), (4, 0), (0, 0)])
def test_nothing(num_rows, tokens, cpu_backend, poison):
    args = make(num_rows=num_rows, tokens=tokens)
    args[ROWS] = torch.full((3, tokens), num_rows)
    out = functional.conv_norm_relu(*args)
    torch.testing.assert_close(out, by_torch(*args))
    expected = torch.autograd.grad(by_torch(*args).sum(), leaves(args))
    for own, true in zip(torch.autograd.grad(out.sum(), leaves(args)), expected, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-4)


def test_one_channel_is_normed_to_nothing(cpu_backend, poison):
    args = make(channels=1)
    out = functional.conv_norm_relu(*args)
    torch.testing.assert_close(out, torch.relu(args[NORM_BIAS]).expand(150, 1))
    (grad,) = torch.autograd.grad(out, args[NORM_BIAS], torch.ones_like(out))
    assert grad.item() == (150 if args[NORM_BIAS] > 0 else 0)


def test_taps_that_reach_nothing_get_no_gradient(cpu_backend, poison):
    args = make(taps=2, kernel_size=5)
    (grad,) = torch.autograd.grad(functional.conv_norm_relu(*args).square().sum(), args[WEIGHT])
    assert torch.equal(grad[:, :, :3], torch.zeros_like(grad[:, :, :3]))
    assert (grad[:, :, 3:] != 0).all()


def test_tensors_that_are_not_contiguous(cpu_backend):
    args = make()
    expected = functional.conv_norm_relu(*args)
    grad = torch.randn(expected.T.shape).T
    wanted = torch.autograd.grad(expected, leaves(args), grad)
    strided = [
        own if place == EPS else torch.stack([own.detach(), own.detach()], -1)[..., 0]
        for place, own in enumerate(args)
    ]  # fmt: skip
    assert not any(own.is_contiguous() for own in strided[:EPS])
    for own in leaves(strided):
        own.requires_grad_()
    out = functional.conv_norm_relu(*strided)
    assert torch.equal(out, expected)
    assert all(map(torch.equal, torch.autograd.grad(out, leaves(strided), grad), wanted))


def test_threads_change_no_bit_of_what_surrounds_the_products(cpu_isa):
    """With a diagonal kernel a product has one term, so nothing depends on how torch cuts it."""
    args = make(num_rows=700, tokens=2000, width=32, channels=32, taps=1)
    args[WEIGHT] = torch.diag(torch.rand(32) + 1).view(32, 32, 1).requires_grad_()
    wanted = [args[place] for place in (INPUT, BIAS, NORM_WEIGHT, NORM_BIAS)]
    grad, threads, found = torch.randn(2000, 32), torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            out = functional.conv_norm_relu(*args)
            found.append([out, *torch.autograd.grad(out, wanted, grad)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nan_is_not_hidden(cpu_backend):
    args = make()
    args[INPUT].data[3] = float("nan")
    out = functional.conv_norm_relu(*args)
    meets = (args[ROWS] == 3).any(0)
    assert out[meets].isnan().all()
    assert not out[~meets].isnan().any()
    (grad,) = torch.autograd.grad(out, args[WEIGHT], torch.ones_like(out))
    assert grad.isnan().all()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (ROWS, lambda t: t.int(), TypeError, "rows must be int64"),
        (ROWS, lambda t: t[0], ValueError, r"rows must be \(taps, T\)"),
        (ROWS, lambda t: t[:0], ValueError, "at least one tap"),
        (ROWS, lambda t: torch.cat([t, t]), ValueError, r"rows name 6 taps, weight of shape .* has 3"),
        (ROWS, lambda t: t.index_fill(1, torch.tensor(7), 24), IndexError, r"rows\[0, 7\] = 24 is outside 0..23"),
        (ROWS, lambda t: t.index_fill(1, torch.tensor(7), -1), IndexError, r"rows\[0, 7\] = -1 is outside 0..23"),
        (INPUT, lambda t: t[0], ValueError, r"input must be \(N, d\)"),
        (INPUT, lambda t: t[:, :0], ValueError, "d at least 1"),
        (INPUT, lambda t: t[:, :5], ValueError, r"weight must be .13, 5, 3. on"),
        (WEIGHT, lambda t: t[0], ValueError, r"weight must be \(channels, d, kernel size\)"),
        (WEIGHT, lambda t: t[:0], ValueError, r"weight must be \(channels, d, kernel size\)"),
        (WEIGHT, lambda t: t.double(), TypeError, "weight is [dD]ouble|weight is torch.float64"),
        (BIAS, lambda t: t[:4], ValueError, r"bias must be .13,?. on"),
        (NORM_WEIGHT, lambda t: t[:4], ValueError, r"norm_weight must be .13,?. on"),
        (NORM_BIAS, lambda t: t.half(), TypeError, "norm_bias is [hH]alf|norm_bias is torch.float16"),
        (EPS, lambda eps: -1e-5, ValueError, "eps = -1e-05 is negative or NaN"),
        (EPS, lambda eps: float("nan"), ValueError, "eps = nan is negative or NaN"),
    ],
)  # fmt: skip
def test_refusals(place, change, error, message, direct, cpu_backend):
    args = make()
    args[place] = change(args[place])
    call = functional.conv_norm_relu if direct else torch.ops.cprec.conv_norm_relu
    with pytest.raises(error, match=message):
        call(*args)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"input must be floating point, got torch.int64"):
        functional.conv_norm_relu(torch.ones(3, 4, dtype=torch.int64), *make()[1:])


def test_backward_refuses_what_does_not_fit(cpu_backend):
    args = [own.detach() if isinstance(own, torch.Tensor) else own for own in make()]
    out, *kept = torch.ops.cprec.conv_norm_relu(*args)
    fits = [torch.ones(150, 13), args[ROWS], args[WEIGHT], args[NORM_WEIGHT], out, *kept, 23, True, True]
    torch.ops.cprec.conv_norm_relu_backward(*fits)
    wrong = {
        0: torch.ones(149, 13),
        3: torch.ones(12),
        4: out[:1],
        5: kept[0][:, :5],
        6: kept[1][:3],
        7: kept[2][:, :1],
    }
    for place, other in wrong.items():
        with pytest.raises(ValueError, match=r"must be .* got"):
            torch.ops.cprec.conv_norm_relu_backward(*fits[:place], other, *fits[place + 1 :])
    with pytest.raises(IndexError, match=r"outside 0\.\.5"):
        torch.ops.cprec.conv_norm_relu_backward(*fits[:-3], 5, True, True)
    with pytest.raises(ValueError, match=r"weight must be \(channels, d, kernel size\)"):
        torch.ops.cprec.conv_norm_relu_backward(*fits[:2], torch.ones(13, 17), *fits[3:])


def test_not_twice_differentiable():
    args = make()
    (grad,) = torch.autograd.grad(functional.conv_norm_relu(*args).square().sum(), args[INPUT], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    out = torch.ops.cprec.conv_norm_relu(*args)[0]
    (grad,) = torch.autograd.grad(out.square().sum(), args[INPUT], create_graph=True)
    with pytest.raises(RuntimeError, match="conv_norm_relu is not twice differentiable"):
        grad.sum().backward()


def test_some_gradients_alone(cpu_backend):
    args = make()
    expected = torch.autograd.grad(functional.conv_norm_relu(*args).square().sum(), args[BIAS])
    frozen = [own.detach() if place not in (ROWS, EPS) else own for place, own in enumerate(args)]
    frozen[BIAS].requires_grad_()
    out = functional.conv_norm_relu(*frozen)
    assert torch.equal(torch.autograd.grad(out.square().sum(), frozen[BIAS])[0], expected[0])


def test_what_is_frozen_costs_nothing(cpu_backend):
    """Neither a gradient nor, without one of the weight, the rows side by side, the largest thing kept."""
    args = make()
    grads, kept = torch.autograd.grad(functional.conv_norm_relu(*args).square().sum(), leaves(args)), []
    for call in (functional.conv_norm_relu, lambda *own: torch.ops.cprec.conv_norm_relu(*own)[0]):
        for place, expected in zip((INPUT, WEIGHT), grads, strict=False):
            own = [arg.detach() if arg_place not in (ROWS, EPS) else arg for arg_place, arg in enumerate(args)]
            own[place].requires_grad_()
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
                out = call(*own)
            assert ((150, 51) in kept) == (place == WEIGHT)
            assert torch.equal(torch.autograd.grad(out.square().sum(), own[place])[0], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant, cpu_backend):
    args = make()
    expected = torch.autograd.grad(functional.conv_norm_relu(*args).square().sum(), leaves(args))
    out = checkpoint(functional.conv_norm_relu, *args, use_reentrant=reentrant)
    out.square().sum().backward()
    assert all(torch.equal(own.grad, true) for own, true in zip(leaves(args), expected, strict=True))


def test_sizes_are_compiled_once():
    """Batches of packed items have all sizes."""
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        functional.conv_norm_relu, dynamic=True, backend=aot_autograd(fw_compiler=lambda g, _: graphs.append(g) or g)
    )
    for num_rows in range(5, 16):
        args = make(num_rows=num_rows, tokens=2 * num_rows)
        out = compiled(*args)
        torch.testing.assert_close(out, functional.conv_norm_relu(*args))
        out.sum().backward()
    assert len(graphs) <= 4


def test_a_trace_can_be_saved():
    args = [own.detach() if isinstance(own, torch.Tensor) else own for own in make()]
    traced = torch.jit.trace(lambda x, rows: functional.conv_norm_relu(x, rows, *args[2:]), args[:2])
    torch.jit.save(traced, io.BytesIO())
    assert torch.equal(traced(*args[:2]), functional.conv_norm_relu(*args))


def test_under_autocast_it_computes_in_what_it_is_given(cpu_backend):
    args = make()
    expected = functional.conv_norm_relu(*args)
    grads = torch.autograd.grad(expected.square().sum(), leaves(args))
    with torch.autocast("cpu", torch.bfloat16):
        for out in (functional.conv_norm_relu(*args), torch.ops.cprec.conv_norm_relu(*args)[0]):
            assert out.dtype == torch.float32
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
            found = torch.autograd.grad(out.square().sum(), leaves(args))
            for own, true in zip(found, grads, strict=True):
                torch.testing.assert_close(own, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck_and_compiled(dtype):
    args = make(dtype=dtype)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.cprec.conv_norm_relu.default, tuple(args), test_utils=utilities)
    plain = [own.detach() if isinstance(own, torch.Tensor) else own for own in args]
    out, *kept = torch.ops.cprec.conv_norm_relu(*plain)
    inputs = (torch.randn_like(out), plain[ROWS], plain[WEIGHT], plain[NORM_WEIGHT], out, *kept, 23, True, True)
    torch.library.opcheck(torch.ops.cprec.conv_norm_relu_backward.default, inputs, test_utils=utilities)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(functional.conv_norm_relu, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
    found = torch.autograd.grad(compiled.square().sum(), leaves(args))
    assert ["conv_norm_relu.default" in code for code in graphs] == [True, False]
    assert ["conv_norm_relu_backward.default" in code for code in graphs] == [False, True]
    eager = functional.conv_norm_relu(*args)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    for own, true in zip(found, torch.autograd.grad(eager.square().sum(), leaves(args)), strict=True):
        torch.testing.assert_close(own, true)


def test_gradcheck():
    with use_backend("reference"):
        args = make(num_rows=4, tokens=5, width=2, channels=3, dtype=torch.float64)
        torch.autograd.gradcheck(functional.conv_norm_relu, args)
