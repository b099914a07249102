"""The state of row-wise optimizers: saved, loaded, copied, and refused where it is another's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cprec_kernels import Partition
from cprec_kernels.nn import BlockEmbedding
from cprec_kernels.optim import RowwiseAdagrad, RowwiseAdamW
from tests.optim.steps import BOTH, make_params, train


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_state_goes_on_bit_for_bit(kind, dtype, cpu_backend):
    def make(params):
        optimizer = kind(params, lr=0.1, weight_decay=0.1)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def run(optimizer, scheduler, params, steps):
        for step in steps:
            train(optimizer, params, [step])
            scheduler.step()

    whole = make_params(dtype)
    optimizer, scheduler = make(whole)
    run(optimizer, scheduler, whole, range(5))
    stream = io.BytesIO()
    torch.save([[p.detach() for p in whole], optimizer.state_dict(), scheduler.state_dict()], stream)
    stream.seek(0)
    weights, state, schedule = torch.load(stream, weights_only=True)
    half = [p.requires_grad_() for p in weights]
    resumed, its_scheduler = make(half)
    resumed.load_state_dict(state)
    its_scheduler.load_state_dict(schedule)
    for p, q in zip(whole, half, strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][name].dtype
    assert float(optimizer.state[whole[0]]["log_decay"]) < 0  # there is something pending
    run(optimizer, scheduler, whole, range(5, 10))
    run(resumed, its_scheduler, half, range(5, 10))
    optimizer.apply_pending_decay()
    resumed.apply_pending_decay()
    for p, q in zip(whole, half, strict=True):
        assert torch.equal(p, q)


@BOTH
def test_loading_does_not_share_tensors_with_the_saved_state(kind):
    params = make_params()
    optimizer = kind(params, weight_decay=0.1)
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(2, 4))
    for index, state in saved["state"].items():
        assert all(torch.equal(value, kept["state"][index][name]) for name, value in state.items())


@BOTH
def test_deep_copies_are_independent_and_equal(kind):
    params = make_params()
    optimizer = kind(params, lr=0.1, weight_decay=0.1)
    train(optimizer, params, range(3))
    others, other = copy.deepcopy((params, optimizer))
    before = [p.detach().clone() for p in params]
    train(other, others, range(3, 6))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    train(optimizer, params, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@BOTH
def test_a_state_of_something_else_is_refused(kind):
    params = make_params()
    optimizer = kind(params, weight_decay=0.1)
    train(optimizer, params, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    sgd = torch.optim.SGD(params, momentum=0.9)
    train(sgd, params[1::2], [])
    for p in params:
        p.grad = torch.ones_like(p)
    sgd.step()
    with pytest.raises(ValueError, match=f"not a state of {kind.__name__}: it has momentum_buffer"):
        optimizer.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match=rf"not a state of {kind.__name__}: it has dense, sparse"):
        optimizer.load_state_dict({"dense": {}, "sparse": {}})
    taller = copy.deepcopy(before)
    name = "sum" if kind is RowwiseAdagrad else "exp_avg"
    taller["state"][0][name] = torch.zeros(31, 5)
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 is \(31, 5\), for a parameter \(30, 5\)"):
        optimizer.load_state_dict(taller)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize(
    ("kind", "name"), [(RowwiseAdagrad, "sum"), (RowwiseAdagrad, "row_log_decay"), (RowwiseAdamW, "row_log_decay")]
)
def test_a_state_with_a_row_too_many_is_refused(kind, name):
    param = torch.ones(12, 3).requires_grad_()
    optimizer = kind([param], weight_decay=0.1)
    train(optimizer, [param], range(2))
    before = optimizer.state_dict()
    longer = copy.deepcopy(before)
    assert longer["state"][0][name].shape == (12,)
    longer["state"][0][name] = torch.ones(13)
    with pytest.raises(ValueError, match=rf"{name} of parameter 0 is \(13,\), for a parameter \(12, 3\)"):
        optimizer.load_state_dict(longer)
    assert str(optimizer.state_dict()) == str(before)


@BOTH
def test_a_state_that_would_fail_later_is_refused(kind):
    """Of other columns; of an optimizer without our numbers, or with others, before its first step too."""
    optimizer = kind([torch.ones(5, 3).requires_grad_()], weight_decay=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    wider = kind([torch.ones(5, 4).requires_grad_()], weight_decay=0.1)
    train(wider, wider.param_groups[0]["params"], [])
    wider.param_groups[0]["params"][0].grad = torch.ones(5, 4)
    wider.step()
    if kind is RowwiseAdamW:
        with pytest.raises(ValueError, match=r"exp_avg of parameter 0 is \(5, 4\), for a parameter \(5, 3\)"):
            optimizer.load_state_dict(wider.state_dict())
    else:
        theirs = torch.optim.Adagrad([torch.ones(5, 3).requires_grad_()])
        with pytest.raises(ValueError, match=r"sum of parameter 0 is \(5, 3\), for a parameter \(5, 3\)"):
            optimizer.load_state_dict(theirs.state_dict())
    sgd = torch.optim.SGD([torch.ones(5, 3).requires_grad_()])
    with pytest.raises(ValueError, match=r"names no .*eps"):
        optimizer.load_state_dict(sgd.state_dict())
    if kind is RowwiseAdamW:
        for options, message in (
            ({"amsgrad": True}, "with amsgrad"),
            ({"weight_decay": 0.5}, r"adds weight_decay = 0\.5 to the gradient"),
        ):
            adam = torch.optim.Adam([torch.ones(5, 3).requires_grad_()], **options)
            with pytest.raises(ValueError, match=message):
                optimizer.load_state_dict(adam.state_dict())
        optimizer.load_state_dict(torch.optim.Adam([torch.ones(5, 3).requires_grad_()]).state_dict())
        return
    assert str(optimizer.state_dict()) == str(before)


@BOTH
def test_state_of_other_strides_and_plain_counters_are_taken(kind):
    """torch keeps the strides of the parameter that a state was saved for, and SparseAdam counts in plain numbers."""
    params = [torch.nn.Parameter(torch.randn(5, 2)), torch.nn.Parameter(torch.randn(()))]
    optimizer = kind(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                state[name] = value.t().contiguous().t()
    resumed = kind([torch.nn.Parameter(param.detach().clone()) for param in params], lr=0.1)
    resumed.load_state_dict(saved)
    for one, other in zip(params, resumed.param_groups[0]["params"], strict=True):
        other.grad = torch.ones_like(other)
        assert resumed.state[other]["step"].dtype == torch.float32
        assert all(value.is_contiguous() for value in resumed.state[other].values())
        one.grad = torch.ones_like(one)
    optimizer.step()
    resumed.step()
    for one, other in zip(params, resumed.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)


@BOTH
def test_moments_of_a_single_number_go_where_it_is(kind):
    param = torch.nn.Parameter(torch.randn(()))
    optimizer = kind([param], lr=0.1)
    param.grad = torch.ones(())
    optimizer.step()
    resumed = kind([torch.nn.Parameter(torch.empty((), device="meta"))], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    (state,) = resumed.state.values()
    assert {name: value.device.type for name, value in state.items()} == {
        name: "cpu" if name == "step" else "meta" for name in state
    }


def test_the_coupled_decay_of_torchs_adagrad_is_refused():
    bias = torch.nn.Parameter(torch.randn(4))
    theirs = torch.optim.Adagrad([bias], weight_decay=0.1)
    bias.grad = torch.ones(4)
    theirs.step()
    with pytest.raises(ValueError, match=r"adds weight_decay = 0\.1 to the gradient"):
        RowwiseAdagrad([bias]).load_state_dict(theirs.state_dict())
    own = RowwiseAdagrad([bias], weight_decay=0.1)
    own.step()
    RowwiseAdagrad([bias]).load_state_dict(own.state_dict())


@BOTH
def test_a_state_is_loaded_again_and_by_copies(kind):
    params = make_params()
    optimizer = kind(params, weight_decay=0.1)
    train(optimizer, params, range(2))
    state = optimizer.state_dict()
    for one in (optimizer, optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        one.load_state_dict(state)
        one.load_state_dict(copy.deepcopy(one.state_dict()))


@BOTH
def test_a_distributed_checkpoint_holds_pending_decay(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        module = BlockEmbedding(Partition(30, [10], [8, 4], 8), sparse=True)
        return module, kind(module.parameters(), lr=0.1, weight_decay=0.5)

    module, optimizer = make()
    for step in range(4):
        optimizer.zero_grad()
        module(torch.tensor([step, 10 + step])).sum().backward()
        optimizer.step()
    weights, state = get_state_dict(module, optimizer)
    dcp.save({"module": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)

    restored, its_optimizer = make()
    weights, state = get_state_dict(restored, its_optimizer)
    dcp.load({"module": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(restored, its_optimizer, model_state_dict=weights, optim_state_dict=state)
    assert not torch.equal(module.embeddings[1][0], make()[0].embeddings[1][0])
    optimizer.apply_pending_decay()
    its_optimizer.apply_pending_decay()
    for one, other in zip(module.parameters(), restored.parameters(), strict=True):
        assert torch.equal(one, other)


@BOTH
def test_sharded_parameters_are_refused(kind):
    class Sharded(torch.Tensor):
        device_mesh = None

    with pytest.raises(TypeError, match=r"must be plain tensors, got a Sharded .* keep the module out of fully_shard"):
        kind([torch.randn(3, 2).as_subclass(Sharded).requires_grad_()])


@BOTH
def test_a_rate_that_has_become_text_is_refused(kind):
    params = make_params()
    optimizer = kind(params)
    optimizer.param_groups[0]["lr"] = "0.1"
    with pytest.raises(ValueError, match=r"lr must be at least 0 and finite, got '0\.1'"):
        train(optimizer, params, [0])


@BOTH
@pytest.mark.parametrize(
    ("saved", "own"),
    [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_moments_of_another_dtype_are_cast(kind, saved, own):
    params, others = make_params(saved), make_params(own)
    optimizer, resumed = kind(params, weight_decay=0.1), kind(others, weight_decay=0.1)
    train(optimizer, params, range(2))
    resumed.load_state_dict(optimizer.state_dict())
    wanted = torch.float64 if own == torch.float64 else torch.float32
    for p, q in zip(params, others, strict=True):
        for name, value in resumed.state[q].items():
            before = optimizer.state[p][name]
            moment = name in kind.required_state - {"step"}
            assert value.dtype == (wanted if moment else before.dtype), name
            torch.testing.assert_close(value, before.to(value.dtype))
    train(resumed, others, range(2, 4))


def test_torch_keeps_moments_in_bf16_and_they_become_fp32():
    param = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.bfloat16))
    theirs = torch.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    theirs.step()
    ours = RowwiseAdamW([param])
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[param]["exp_avg"].dtype == torch.float32
    ours.step()


@BOTH
def test_a_parameter_that_changed_its_dtype_is_refused_before_anything_changes(kind):
    params = make_params()
    optimizer = kind(params)
    train(optimizer, params, range(2))
    params[-1].data = params[-1].data.double()
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param.detach().clone() for param in params]
    with pytest.raises(
        TypeError, match=r"is torch.float32, and must be torch.float64 now .* load this optimizer's own"
    ):
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))
