import pytest
import torch

from cprec.model import NextItNetConfig, ResidualStack
from cprec.model.sharing import BLOCK_KINDS, SHARINGS, backbone_parameters, parameter_sets, set_count

SCHEMES = [(block, sharing) for block in BLOCK_KINDS for sharing in SHARINGS]
SCHEMES.remove(("bottleneck", "adjacent-layer"))


def config(block, sharing, num_blocks, width=6, kernel_size=3):
    return NextItNetConfig.from_plan(
        20, width, dilations=range(1, num_blocks + 1), kernel_size=kernel_size, block=block, sharing=sharing
    )


@pytest.mark.parametrize(
    ("block", "sharing", "expected"),
    [
        ("residual", "none", ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))),
        ("residual", "cross-layer", ((0, 0),) * 5),
        ("residual", "cross-block", ((0, 1),) * 5),
        ("residual", "adjacent-layer", ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4))),
        ("residual", "adjacent-block", ((0, 1), (0, 1), (2, 3), (2, 3), (4, 5))),
        ("bottleneck", "none", ((0,), (1,), (2,), (3,), (4,))),
        ("bottleneck", "cross-layer", ((0,),) * 5),
        ("bottleneck", "cross-block", ((0,),) * 5),
        ("bottleneck", "adjacent-block", ((0,), (0,), (1,), (1,), (2,))),
    ],
)
def test_which_layer_uses_which_set(block, sharing, expected):
    assert parameter_sets(5, block, sharing) == expected
    assert set_count(5, block, sharing) == len({index for sets in expected for index in sets})


@pytest.mark.parametrize(("block", "sharing"), SCHEMES)
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize(("width", "kernel_size"), [(6, 3), (7, 2), (2, 1)])
def test_parameter_count_is_the_documented_formula(block, sharing, num_blocks, width, kernel_size):
    stack = ResidualStack(config(block, sharing, num_blocks, width, kernel_size))
    pairs = -(-num_blocks // 2)
    if block == "residual":
        sets = {
            "none": 2 * num_blocks, "cross-layer": 1, "cross-block": 2, "adjacent-layer": num_blocks,
            "adjacent-block": 2 * pairs,
        }[sharing]  # fmt: skip
        expected = sets * (kernel_size * width**2 + width) + 4 * num_blocks * width
    else:
        sets = {"none": num_blocks, "cross-layer": 1, "cross-block": 1, "adjacent-block": pairs}[sharing]
        m = width // 2
        convolutions = (width * m + m) + (kernel_size * m * m + m) + (m * width + width)
        expected = sets * convolutions + num_blocks * (2 * width + 4 * m)
    assert backbone_parameters(num_blocks, block, sharing, width, kernel_size) == expected
    assert sum(parameter.numel() for parameter in stack.parameters()) == expected
    assert sum(tensor.numel() for tensor in stack.state_dict().values()) == expected


@pytest.mark.parametrize(("block", "sharing"), SCHEMES)
def test_a_shared_model_equals_an_unshared_one_with_copied_weights(block, sharing):
    torch.manual_seed(0)
    shared = ResidualStack(config(block, sharing, 3)).double()
    plain = ResidualStack(config(block, "none", 3)).double()
    for parameter in shared.parameters():
        torch.nn.init.normal_(parameter)
    plain.norms.load_state_dict(shared.norms.state_dict())
    for ours, theirs in zip(shared.set_of, plain.set_of, strict=True):
        for source, target in zip(ours, theirs, strict=True):
            plain.sets[target].load_state_dict(shared.sets[source].state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    expected = plain(x)
    torch.testing.assert_close(shared(x), expected)

    # The gradient of a shared set is the sum over the places that use it.
    expected.square().sum().backward()
    shared(x).square().sum().backward()
    sums = [dict.fromkeys(dict(module.named_parameters()), 0.0) for module in shared.sets]
    for ours, theirs in zip(shared.set_of, plain.set_of, strict=True):
        for source, target in zip(ours, theirs, strict=True):
            for name, parameter in plain.sets[target].named_parameters():
                sums[source][name] = sums[source][name] + parameter.grad
    for module, total in zip(shared.sets, sums, strict=True):
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(parameter.grad, total[name])


def test_unknown_and_senseless_schemes():
    with pytest.raises(ValueError, match="is not one of"):
        parameter_sets(2, "residual", "cross")
    with pytest.raises(ValueError, match="use 'adjacent-block'"):
        backbone_parameters(2, "bottleneck", "adjacent-layer", 8, 3)
