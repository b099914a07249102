"""state_dicts of torch's nn.AdaptiveLogSoftmaxWithLoss and of ours, read as each other."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from cprec_kernels import Partition
from cprec_kernels.convert import from_adaptive_state_dict, to_adaptive_state_dict
from cprec_kernels.nn import ClusteredSoftmaxWithLoss
from cprec_kernels.nn.adaptive_layout import div_value_of, resolve_div_value


class Model(nn.Module):
    def __init__(self, softmax):
        super().__init__()
        self.encoder = nn.Linear(16, 16)
        self.decoder = nn.Module()
        self.decoder.softmax = softmax


def torchs(**options):
    return nn.AdaptiveLogSoftmaxWithLoss(16, 60, [7, 20], div_value=2.0, **options)


PARTITION = Partition(60, [7, 20], [16, 8, 4], 16)


def test_a_checkpoint_of_a_model_loads_after_its_softmax_was_replaced():
    theirs = Model(torchs(head_bias=True))
    ours = Model(ClusteredSoftmaxWithLoss(16, PARTITION, head_bias=True))
    assert not any(ours.load_state_dict(theirs.state_dict()))
    hidden, target = torch.randn(9, 16), torch.randint(60, (9,))
    torch.testing.assert_close(
        tuple(ours.decoder.softmax(hidden, target)), tuple(theirs.decoder.softmax(hidden, target))
    )


def test_ours_loads_into_torchs():
    ours, theirs = ClusteredSoftmaxWithLoss(16, PARTITION, head_bias=True), torchs(head_bias=True)
    nn.init.normal_(ours.head_bias)
    theirs.load_state_dict(to_adaptive_state_dict(ours.state_dict(), PARTITION))
    hidden = torch.randn(9, 16)
    torch.testing.assert_close(theirs.log_prob(hidden), ours.log_prob(hidden))


def test_prefixes_select_a_part_of_a_model():
    state = Model(torchs()).state_dict()
    partition, converted = from_adaptive_state_dict(state, "decoder.softmax.")
    assert partition == PARTITION
    assert converted["weights.1"] is state["decoder.softmax.tail.0.1.weight"]
    back = to_adaptive_state_dict(converted, partition, prefix="decoder.softmax.")
    assert {name for name in state if name.startswith("decoder")} == set(back)
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_tail_biases_that_torch_lacks_start_at_zero():
    ours = ClusteredSoftmaxWithLoss(16, PARTITION, tail_bias=True)
    nn.init.normal_(ours.tail_biases[1])
    ours.load_state_dict(torchs().state_dict())
    assert all(torch.count_nonzero(bias) == 0 for bias in ours.tail_biases)


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    ours = ClusteredSoftmaxWithLoss(16, Partition(60, [7, 21], [16, 8, 4], 16))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"is that of an adaptive softmax of Partition\(num_items=60, cutoffs=\(7, 20\)"
    ):
        ours.load_state_dict(torchs().state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*head_bias"):
        ClusteredSoftmaxWithLoss(16, PARTITION, head_bias=True).load_state_dict(torchs().state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*head_bias"):
        ClusteredSoftmaxWithLoss(16, PARTITION).load_state_dict(torchs(head_bias=True).state_dict())


def test_a_state_dict_of_something_else_is_named():
    with pytest.raises(ValueError, match=r"lacks 'head.weight'"):
        from_adaptive_state_dict({"weight": torch.zeros(3, 3)})
    state = torchs().state_dict()
    with pytest.raises(ValueError, match="0 tails for a head of 9 rows"):
        from_adaptive_state_dict({"head.weight": state["head.weight"]})
    with pytest.raises(ValueError, match=r"'tail.1.1.weight' of .* must be \(rows, 4\), got shape \(40, 5\)"):
        from_adaptive_state_dict({**state, "tail.1.1.weight": torch.zeros(40, 5)})
    with pytest.raises(ValueError, match=r"'head.bias' must be \(9,\), got shape \(8,\)"):
        from_adaptive_state_dict({**state, "head.bias": torch.zeros(8)})
    ours = ClusteredSoftmaxWithLoss(16, PARTITION).state_dict()
    del ours["projections.1"]
    with pytest.raises(ValueError, match=r"lacks 'projections.1'"):
        to_adaptive_state_dict(ours, PARTITION)


def test_the_div_value_is_the_shortest_there_is():
    assert div_value_of(Partition(100, [10], [64, 21], 64)) == 3.0
    assert div_value_of(Partition(100, [10, 30], [64, 16, 4], 64)) == 4.0


@pytest.mark.parametrize("ranks", [[64, 10, 9], [64, 64, 1], [64, 7, 5, 2], [64, 40, 3]], ids=str)
def test_the_div_value_that_is_suggested_is_not_refused(ranks):
    partition = Partition(100, [10, 30, 50][: len(ranks) - 1], ranks, 64)
    with pytest.raises(ValueError, match="such as div_value=") as caught:
        resolve_div_value(partition, None)
    suggested = float(re.search(r"such as div_value=([\d.]+)", str(caught.value))[1])
    assert resolve_div_value(partition, suggested) == suggested


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_tail_without_a_column_starts_as_a_fresh_module_does():
    theirs = nn.AdaptiveLogSoftmaxWithLoss(256, 300, [10, 30], div_value=20.0)
    assert theirs.tail[1][0].weight.shape == (0, 256)
    _, state = from_adaptive_state_dict(theirs.state_dict())
    assert float(state["projections.1"].std()) == pytest.approx(256**-0.5, rel=0.2)
