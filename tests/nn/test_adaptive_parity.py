"""ClusteredSoftmaxWithLoss in the place of torch's nn.AdaptiveLogSoftmaxWithLoss: what that one promises, and what it lacks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss
from cprec_kernels.testing import assert_accurate, make_hidden, make_targets

# (in_features, n_classes, cutoffs, options); the second has a tail of one class, the last two tails as wide as the model.
TORCHS = [
    (16, 60, [7, 20, 41], {}),
    (8, 12, [1, 11], {"div_value": 2.0, "head_bias": True}),
    (33, 90, [10, 50], {"div_value": 3.7, "head_bias": True}),
    (16, 60, [7, 20], {"div_value": 1.0}),
    (16, 60, [7, 20], {"div_value": 0.5, "head_bias": True}),
]


def make_torchs(case, dtype=torch.float32):
    width, classes, cutoffs, options = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tail without columns
        module = nn.AdaptiveLogSoftmaxWithLoss(width, classes, cutoffs, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)  # so that levels are far from uniform
    return module


@pytest.fixture(params=TORCHS, ids=lambda case: f"{case[0]}-{case[2]}-{case[3].get('div_value', 4.0)}")
def torchs(request):
    return make_torchs(request.param)


def batch(module, rows=50, dtype=torch.float32):
    hidden = torch.randn(rows, module.in_features, dtype=torch.float64).to(dtype)
    return hidden, torch.cat([torch.tensor([0, module.n_classes - 1]), torch.randint(module.n_classes, (rows - 2,))])


# Equal outputs


def test_from_adaptive_has_the_same_outputs_loss_and_gradients(torchs):
    ours, truth = ClusteredSoftmaxWithLoss.from_adaptive(torchs), copy.deepcopy(torchs).double()
    hidden, target = batch(torchs)
    inputs = [hidden.clone().requires_grad_(), hidden.clone().requires_grad_(), hidden.double().requires_grad_()]
    for module, h in zip((ours, torchs, truth), inputs, strict=True):
        module(h, target).loss.backward()
    compare = [("output", lambda m, h: m(h, target).output), ("loss", lambda m, h: m(h, target).loss)]
    compare += [("log_prob", lambda m, h: m.log_prob(h)), ("gradient", lambda m, h: h.grad)]
    for name, value in compare:
        results = [value(module, h).detach() for module, h in zip((ours, torchs, truth), inputs, strict=True)]
        assert_accurate(*results, torch.float32, name)
    assert torch.equal(ours.predict(hidden), truth.log_prob(hidden.double()).argmax(1))


def test_parameters_get_torchs_gradients():
    module = make_torchs((33, 90, [10, 50], {"div_value": 3.7, "head_bias": True}), torch.float64)
    ours = ClusteredSoftmaxWithLoss.from_adaptive(module)
    hidden, target = batch(module, dtype=torch.float64)
    module(hidden, target).loss.backward()
    ours(hidden, target).loss.backward()
    pairs = [(ours.weights[0], module.head.weight), (ours.head_bias, module.head.bias)]
    for i, tail in enumerate(module.tail):
        pairs += [(ours.weights[i + 1], tail[1].weight), (ours.projections[i], tail[0].weight)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-13)


def test_to_adaptive_goes_back(torchs):
    ours = ClusteredSoftmaxWithLoss.from_adaptive(torchs)
    columns = [tail[0].weight.shape[0] for tail in torchs.tail]
    back = ours.to_adaptive(None if all(columns) else 2.5)
    hidden, target = batch(torchs)
    truth = copy.deepcopy(torchs).double()(hidden.double(), target).output
    assert_accurate(back(hidden, target).output, torchs(hidden, target).output, truth, torch.float32)
    if torchs.div_value > 1 and all(columns):  # nothing had to be multiplied out or added
        assert {k: v.shape for k, v in back.state_dict().items()} == {
            k: v.shape for k, v in torchs.state_dict().items()
        }
        for name, tensor in torchs.state_dict().items():
            assert torch.equal(back.state_dict()[name], tensor)


@pytest.mark.parametrize("div_value", [None, 1.0])
def test_to_adaptive_pads_and_multiplies_out(div_value):
    partition = Partition(150, [40, 100], [12, 6, 2], 24)  # a projected head, which torch's has not
    ours = ClusteredSoftmaxWithLoss(24, partition, head_bias=True, dtype=torch.float64)
    nn.init.normal_(ours.head_bias)
    theirs = ours.to_adaptive(div_value)
    hidden, target = make_hidden(partition, (40,), torch.float64), make_targets(partition, (40,)).clamp(min=0)
    torch.testing.assert_close(theirs(hidden, target).output, ours(hidden, target).output)
    torch.testing.assert_close(theirs.log_prob(hidden), ours.log_prob(hidden))
    assert theirs.tail[0][0].weight.shape == ((6, 24) if div_value is None else (24, 24))
    # padding is not dead: the columns that were added can learn
    theirs(hidden, target).loss.backward()
    assert (theirs.tail[0][1].weight.grad != 0).any(0).all()


def test_a_tail_that_torch_gave_no_column_stays_uniform_and_can_learn():
    module = make_torchs((64, 5000, [100, 500, 1000, 2000], {}))
    assert module.tail[-1][0].weight.shape[0] == 0
    ours = ClusteredSoftmaxWithLoss.from_adaptive(module)
    assert ours.partition.ranks == (64, 16, 4, 1, 1)
    hidden = torch.randn(30, 64)
    assert_accurate(
        ours.log_prob(hidden).detach(),
        module.log_prob(hidden).detach(),
        copy.deepcopy(module).double().log_prob(hidden.double()).detach(),
        torch.float32,
    )
    ours(hidden, torch.randint(2000, 5000, (30,))).loss.backward()
    assert ours.weights[-1].grad.abs().max() > 0


def test_what_torchs_module_cannot_hold_is_refused():
    single = ClusteredSoftmaxWithLoss(16, Partition.single(90, 16))
    with pytest.raises(ValueError, match="at least one cutoff"):
        single.to_adaptive()
    partition = Partition(90, [10, 50], [16, 5, 4], 16)
    with pytest.raises(ValueError, match="no biases in its tails"):
        ClusteredSoftmaxWithLoss(16, partition, tail_bias=True).to_adaptive()
    with pytest.raises(ValueError, match=r"no div_value gives .* the tail ranks \[5, 4\] at width 16.*div_value=2.0"):
        ClusteredSoftmaxWithLoss(16, partition).to_adaptive()
    assert ClusteredSoftmaxWithLoss(16, partition).to_adaptive(2.0).tail[0][0].weight.shape == (8, 16)
    for bad in (4.0, 0.0, -1.0):
        with pytest.raises(ValueError, match=f"div_value = {bad} gives tails of"):
            ClusteredSoftmaxWithLoss(16, partition).to_adaptive(bad)
    for option, value in (("reduction", "sum"), ("label_smoothing", 0.1), ("z_loss", 1e-4)):
        with pytest.raises(ValueError, match=f"has no {option}"):
            ClusteredSoftmaxWithLoss(16, partition, **{option: value}).to_adaptive(2.0)
    with pytest.raises(TypeError, match=r"takes an nn.AdaptiveLogSoftmaxWithLoss, got Linear"):
        ClusteredSoftmaxWithLoss.from_adaptive(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="unknown options head_bias"):
        ClusteredSoftmaxWithLoss.from_adaptive(make_torchs(TORCHS[0]), head_bias=True)
    with pytest.raises(ValueError, match="at most 8 clusters"):
        ClusteredSoftmaxWithLoss.from_adaptive(make_torchs((16, 60, list(range(1, 9)), {"div_value": 1.1})))


def test_what_is_frozen_stays_frozen_both_ways():
    module = make_torchs(TORCHS[1])
    for parameter in (module.head.weight, module.tail[0][1].weight):
        parameter.requires_grad_(False)
    ours = ClusteredSoftmaxWithLoss.from_adaptive(module, tail_bias=False)
    learning = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert not {"weights.0", "weights.1"} & learning
    assert {"projections.0", "weights.2"} <= learning
    back = ours.to_adaptive(div_value=TORCHS[1][3].get("div_value"))
    for (name, now), (_, was) in zip(back.named_parameters(), module.named_parameters(), strict=True):
        assert now.requires_grad == was.requires_grad, name


def test_a_product_learns_while_one_of_its_factors_does():
    module = make_torchs(TORCHS[3])
    for factor, learns in zip(module.tail[0], (True, False), strict=True):
        factor.weight.requires_grad_(False)
        assert ClusteredSoftmaxWithLoss.from_adaptive(module).weights[1].requires_grad == learns


def test_kind_of_the_copy_is_that_of_the_original():
    module = make_torchs(TORCHS[1], torch.bfloat16).eval().requires_grad_(False)
    ours = ClusteredSoftmaxWithLoss.from_adaptive(module, reduction="sum", tail_bias=True)
    assert ours.weights[0].dtype == torch.bfloat16
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours.reduction == "sum"
    assert torch.count_nonzero(ours.tail_biases[0]) == 0
    assert not ClusteredSoftmaxWithLoss.from_adaptive(module).to_adaptive(2.0).training
    ours.weights[0].zero_()
    assert module.head.weight.abs().max() > 0  # a copy, not a view


def test_names_of_torchs_module_are_there():
    theirs = make_torchs(TORCHS[0])
    ours = ClusteredSoftmaxWithLoss.from_adaptive(theirs)
    for name in ("in_features", "n_classes", "cutoffs", "shortlist_size", "n_clusters", "head_size"):
        assert getattr(ours, name) == getattr(theirs, name), name


# What the documentation of torch's module promises, tested on ours


@pytest.fixture
def head():
    module = make_torchs((16, 20, [5, 10, 15], {"div_value": 2.0}))
    return ClusteredSoftmaxWithLoss.from_adaptive(module)


def test_shapes(head):
    hidden = torch.randn(4, 16)
    output, loss = head(hidden, torch.tensor([0, 6, 13, 19]))
    assert output.shape == (4,)
    assert loss.shape == ()
    assert head.log_prob(hidden).shape == (4, 20)
    assert head.predict(hidden).shape == (4,)
    unbatched = head(hidden[1], torch.tensor(6))
    assert unbatched.output.shape == ()
    torch.testing.assert_close(unbatched.output, output[1])
    torch.testing.assert_close(unbatched.loss, -output[1])


@pytest.mark.parametrize("target", [torch.tensor([5, 4]), torch.tensor([-1]), torch.tensor([20])])
def test_sizes_that_differ_and_targets_out_of_range_are_refused(head, target):
    with pytest.raises((ValueError, IndexError)):
        head(torch.randn(1, 16), target)


@pytest.mark.parametrize("cutoffs", [[5, 15, 15], [15, 5], [5, 25], [0, 5], [-1, 5], [5, 20], [4.5, 7]])
def test_cutoffs_that_do_not_partition_are_refused(cutoffs):
    with pytest.raises((ValueError, TypeError)):
        Partition(20, cutoffs, [16] * (len(cutoffs) + 1), 16)


def test_a_target_is_in_the_cluster_that_cutoffs_say(head):
    """Item 5 is the first of the first tail: only that tail and the head may get gradients."""
    for item, tail in ((4, None), (5, 1), (9, 1), (10, 2), (15, 3), (19, 3)):
        head.zero_grad()
        head(torch.randn(1, 16), torch.tensor([item])).loss.backward()
        touched = [j for j in (1, 2, 3) if head.weights[j].grad.abs().max() > 0]
        assert touched == ([] if tail is None else [tail])


def test_log_probabilities_sum_to_one(head):
    assert_close = torch.testing.assert_close
    assert_close(head.log_prob(torch.randn(100, 16)).exp().sum(1), torch.ones(100))


def test_output_is_the_targets_log_prob_and_loss_its_negative_mean(head):
    hidden, target = torch.randn(40, 16), torch.randint(20, (40,))
    output, loss = head(hidden, target)
    torch.testing.assert_close(output, head.log_prob(hidden).gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(loss, nn.functional.nll_loss(head.log_prob(hidden), target))
    torch.testing.assert_close(loss, -output.mean())


@pytest.mark.parametrize("parents", [-30.0, 30.0, 0.0])
def test_predict_with_all_rows_in_the_shortlist_none_and_some(head, parents):
    hidden = torch.randn(64, 16)
    hidden[:, 0] = 1.0
    with torch.no_grad():
        head.weights[0][head.shortlist_size :, 0] = parents
    predicted = head.predict(hidden)
    assert torch.equal(predicted, head.log_prob(hidden).argmax(1))
    if parents:
        assert ((predicted < head.shortlist_size) == (parents < 0)).all()


# What its users asked for and do not have


def test_ignored_targets_count_for_nothing(head):
    hidden, target = torch.randn(9, 16, requires_grad=True), torch.randint(20, (9,))
    target[::3] = -100
    output, loss = head(hidden, target)
    loss.backward()
    assert torch.count_nonzero(output[::3]) == 0
    assert torch.count_nonzero(hidden.grad[::3]) == 0
    torch.testing.assert_close(loss, head(hidden[target >= 0], target[target >= 0]).loss)


def test_reductions(head):
    hidden, target = torch.randn(9, 16), torch.randint(20, (9,))
    target[2] = -100
    log_prob = head.log_prob(hidden)
    for reduction in ("none", "mean", "sum"):
        head.reduction = reduction
        torch.testing.assert_close(
            head(hidden, target).loss, nn.functional.nll_loss(log_prob, target, reduction=reduction)
        )


def test_inputs_of_any_number_of_dimensions(head):
    hidden, target = torch.randn(3, 4, 5, 16), torch.randint(20, (3, 4, 5))
    output, loss = head(hidden, target)
    flat = head(hidden.reshape(-1, 16), target.reshape(-1))
    assert torch.equal(output, flat.output.reshape(3, 4, 5))
    assert torch.equal(loss, flat.loss)


def test_a_bias_in_every_cluster(head):
    biased = ClusteredSoftmaxWithLoss(16, head.partition, head_bias=True, tail_bias=True)
    biased.load_state_dict(head.state_dict(), strict=False)
    hidden, target = torch.randn(9, 16), torch.full((9,), 17)
    torch.testing.assert_close(biased(hidden, target).loss, head(hidden, target).loss)
    with torch.no_grad():
        biased.tail_biases[2][2] += 20
    assert (biased.predict(hidden)[biased.predict(hidden) >= 15] == 17).all()
    assert biased(hidden, target).loss < head(hidden, target).loss


def test_label_smoothing_is_that_of_every_level(head):
    head.label_smoothing = 0.1
    hidden, target = torch.randn(7, 16), torch.tensor([0, 4, 5, 9, 12, 15, 19])
    logits = hidden @ head.weights[0].T
    column = torch.tensor([0, 4, 5, 5, 6, 7, 7])
    expected = nn.functional.cross_entropy(logits, column, reduction="sum", label_smoothing=0.1)
    for j, (rows, low) in enumerate((([2, 3], 5), ([4], 10), ([5, 6], 15)), start=1):
        tail = hidden[rows] @ head.projections[j - 1].T @ head.weights[j].T
        expected = expected + nn.functional.cross_entropy(
            tail, target[rows] - low, reduction="sum", label_smoothing=0.1
        )
    torch.testing.assert_close(head(hidden, target).loss, expected / 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(head, dtype):
    hidden, target = torch.randn(50, 16, requires_grad=True), torch.randint(20, (50,))
    expected = head(hidden, target).loss
    with torch.autocast("cpu", dtype):
        narrow = nn.functional.linear(hidden, torch.eye(16))
        assert narrow.dtype == dtype
        output, loss = head(narrow, target)
    loss.backward()
    assert output.dtype == loss.dtype == torch.float32
    assert head.weights[0].grad.dtype == torch.float32
    assert abs(loss - expected) < 0.05


def test_an_empty_batch_has_loss_zero_and_zero_gradients(head):
    output, loss = head(torch.randn(0, 16), torch.empty(0, dtype=torch.int64))
    assert output.shape == (0,)
    assert loss == 0
    loss.backward()
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in head.parameters())
    assert head.predict(torch.randn(0, 16)).shape == (0,)


def test_clusters_without_a_target_get_zero_gradients_not_none(head):
    head(torch.randn(6, 16), torch.zeros(6, dtype=torch.int64)).loss.backward()
    assert [name for name, parameter in head.named_parameters() if parameter.grad is None] == []
    assert torch.count_nonzero(head.weights[2].grad) == 0


def test_it_compiles_whole_and_exports(head):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, hidden, target):
            output, loss = self.head(hidden, target)
            return output, loss, self.head.predict(hidden), *self.head.topk(hidden, 3)

    hidden, target = torch.randn(6, 16), torch.randint(20, (6,))
    expected = Step()(hidden, target)
    compiled = torch.compile(Step(), fullgraph=True)(hidden, target)
    dynamic = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(Step(), (hidden, target), dynamic_shapes=(dynamic, dynamic))
    for ours in (compiled, program.module()(hidden, target)):
        for value, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, wanted)


def test_the_k_best_items_not_only_the_best(head):
    hidden = torch.randn(30, 16)
    scores, items = head.topk(hidden, 5)
    expected = head.log_prob(hidden).detach().sort(dim=1, descending=True, stable=True)
    assert torch.equal(items, expected.indices[:, :5])
    torch.testing.assert_close(scores, expected.values[:, :5])


def test_classes_far_beyond_fp32s_range_of_exponents(head):
    """Logits of thousands: a log-sum-exp that is not shifted would overflow."""
    head.reduction = "none"
    hidden = 1000 * torch.randn(8, 16)
    loss = head(hidden, torch.randint(20, (8,))).loss
    assert loss.isfinite().all()
    assert head.log_prob(hidden).isfinite().all()


def test_ddp_waits_for_no_gradient(tmp_path):
    """Batches without a target in a tail: torch's module leaves its tails without gradients, and DDP stops at the next step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        theirs = nn.AdaptiveLogSoftmaxWithLoss(16, 60, [10, 30], div_value=2.0)
        hidden, target = torch.randn(8, 16), torch.arange(8)
        for module in (ClusteredSoftmaxWithLoss.from_adaptive(theirs), theirs):
            parallel = nn.parallel.DistributedDataParallel(module)
            parallel(hidden, target).loss.backward()
            if module is theirs:
                with pytest.raises(RuntimeError, match="finished reduction"):
                    parallel(hidden, target)
                continue
            parallel(hidden, target).loss.backward()
            assert all(parameter.grad is not None for parameter in module.parameters())
    finally:
        torch.distributed.destroy_process_group()
