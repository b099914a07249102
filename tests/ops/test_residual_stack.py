"""cprec::residual_stack: against the fp64 reference, against plain convolutions, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cprec_kernels import Partition, functional, use_backend
from cprec_kernels.reference.residual_stack import residual_stack as reference
from cprec_kernels.testing import assert_accurate, make_embedding

EPS = 1e-8
PADDING, TABLES, PROJECTIONS, WEIGHTS, BIASES, GAINS, SHIFTS, SETS, DILATIONS = range(
    9
)  # places of arguments after ids


def make(partition, sets=(0, 1, 2, 3), dilations=(1, 2, 4, 8), taps=3, dtype=torch.float32):
    """Arguments after ids; the last id of the partition is padding."""
    width = partition.embedding_dim
    tables, projections = make_embedding(partition, torch.float32)
    count = 1 + max(sets)
    weights = [torch.randn(width, width, taps) * (taps * width) ** -0.5 for _ in range(count)]
    biases = [0.1 * torch.randn(width) for _ in range(count)]
    gains = [1 + 0.1 * torch.randn(width) for _ in sets]
    shifts = [0.1 * torch.randn(width) for _ in sets]
    lists = [[t.to(dtype) for t in group] for group in (tables, projections, weights, biases, gains, shifts)]
    return [partition.num_items - 1, *lists, list(sets), list(dilations), EPS]


def histories(partition, rows=9, length=20):
    """Padded on the left by 0, 1, ..., one padded throughout, one padded in the middle and one at its end."""
    ids = torch.randint(partition.num_items - 1, (rows, length))
    for row in range(rows):
        ids[row, : row * length // rows] = partition.num_items - 1
    ids[1] = partition.num_items - 1
    ids[2, 3 : length - 2] = partition.num_items - 1
    ids[3, -1] = partition.num_items - 1
    return ids


def check(ids, args):
    tensors = (TABLES, PROJECTIONS, WEIGHTS, BIASES, GAINS, SHIFTS)
    wide = [[t.double() for t in arg] if place in tensors else arg for place, arg in enumerate(args)]
    out = functional.residual_stack(ids, *args)
    assert_accurate(out, reference(ids, *args), reference(ids, *wide), torch.float32)
    return out


def test_forward_accuracy(case, cpu_backend, poison):
    ids = histories(case.partition)
    out = check(ids, make(case.partition))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.equal(out[3], torch.zeros_like(out[3]))


@pytest.mark.parametrize("taps", [1, 2, 5, 17])
@pytest.mark.parametrize("dilations", [(1, 1), (3, 50), (2, 4, 1, 2, 7, 14), (10**18, 2**62)])
def test_taps_and_dilations(taps, dilations, cpu_backend, poison):
    partition = Partition(50, [10], [20, 6], 20)
    check(histories(partition, 6, 13), make(partition, range(len(dilations)), dilations, taps))


@pytest.mark.parametrize("sets", [(0, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1), (1, 0, 1, 1)])
def test_shared_parameters(sets, cpu_backend, poison):
    partition = Partition(50, [10], [16, 6], 16)
    check(histories(partition), make(partition, sets))


@pytest.mark.parametrize("shape", [(0, 20), (1, 1), (1, 200), (300, 3)])
def test_shapes(shape, cpu_backend, poison):
    partition = Partition(50, [10], [24, 6], 24)
    check(torch.randint(49, shape), make(partition))


def test_a_block_is_torch_convolutions(cpu_backend):
    partition = Partition.single(30, 12)
    args = make(partition, (0, 1), (2, 3))
    _, tables, _, weights, biases, gains, shifts, *_ = args
    ids = torch.randint(29, (4, 15))
    x = y = F.embedding(ids, tables[0])
    for layer, dilation in enumerate((2, 3)):
        padded = F.pad(y.transpose(1, 2), (2 * dilation, 0))
        y = F.conv1d(padded, weights[layer], biases[layer], dilation=dilation).transpose(1, 2)
        y = F.relu(F.layer_norm(y, (12,), gains[layer], shifts[layer], EPS))
    torch.testing.assert_close(functional.residual_stack(ids, *args), (x + y)[:, -1])


def test_rows_do_not_depend_on_their_batch(cpu_isa):
    partition = Partition(50, [10], [40, 6], 40)
    ids, args = histories(partition, 31), make(partition)
    whole = functional.residual_stack(ids, *args)
    for row in range(31):
        assert torch.equal(functional.residual_stack(ids[row : row + 1], *args)[0], whole[row])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(functional.residual_stack(ids, *args), whole)
    finally:
        torch.set_num_threads(threads)


def test_padding_on_the_left_changes_nothing(cpu_isa):
    partition = Partition(50, [10], [40, 6], 40)
    ids, args = torch.randint(49, (5, 7)), make(partition)
    padded = torch.cat([torch.full((5, 6), 49), ids], dim=1)
    assert torch.equal(functional.residual_stack(padded, *args), functional.residual_stack(ids, *args))


def test_any_memory_layout(cpu_isa):
    partition = Partition(50, [10], [16, 6], 16)
    ids, args = histories(partition), make(partition)
    expected = functional.residual_stack(ids, *args)
    args[3] = [weight.permute(2, 1, 0).contiguous().permute(2, 1, 0) for weight in args[3]]
    args[5] = [torch.stack([gain, gain], 1)[:, 0] for gain in args[5]]
    assert torch.equal(functional.residual_stack(ids.T.contiguous().T, *args), expected)


def test_nan_is_not_hidden(cpu_backend):
    partition = Partition(50, [10], [16, 6], 16)
    ids, args = torch.randint(49, (3, 5)), make(partition)
    args[1][0][ids[ids < 10].min() if (ids < 10).any() else 0, 3] = float("nan")
    ids[1, -1] = ids[ids < 10].min() if (ids < 10).any() else 0
    assert functional.residual_stack(ids, *args)[1].isnan().any()


def test_other_dtypes_run_through_the_reference():
    partition = Partition(50, [10], [16, 6], 16)
    ids = histories(partition)
    wide = make(partition, dtype=torch.float64)
    assert torch.equal(functional.residual_stack(ids, *wide), reference(ids, *wide))
    with use_backend("reference"):
        args = make(partition)
        assert torch.equal(functional.residual_stack(ids, *args), reference(ids, *args))


def test_fake_shapes():
    partition = Partition(50, [10], [16, 6], 16)
    args = make(partition)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = functional.residual_stack(mode.from_tensor(histories(partition)), *args)
    assert out.shape == (9, 16)


def changed(place, index, value):
    def change(args):
        if index is None:
            args[place] = value(args[place])
        else:
            args[place][index] = value(args[place][index])

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (changed(SETS, None, lambda s: s[:3]), ValueError, "names 3 layers: a block has two"),
        (changed(SETS, None, lambda s: []), ValueError, "names 0 layers"),
        (changed(SETS, 1, lambda s: 9), ValueError, r"sets\[1\] = 9 is outside 0..3"),
        (changed(DILATIONS, 2, lambda s: 0), ValueError, r"dilations\[2\] must be at least 1, got 0"),
        (changed(DILATIONS, None, lambda s: s[:2]), ValueError, "4 layers need as many dilations and norms, got 2"),
        (changed(BIASES, None, lambda s: s[:2]), ValueError, "weights and biases must be as many, got 4 and 2"),
        (changed(PADDING, None, lambda _: 50), ValueError, "padding_id = 50 is outside 0..49"),
        (changed(TABLES, None, lambda _: []), ValueError, "embeddings must hold at least one table"),
        (changed(TABLES, 1, lambda e: e.repeat(1, 3)), ValueError, r"embeddings\[1\] has rank 18, outside 1..16"),
        (changed(WEIGHTS, 0, lambda w: w[:, :, 0]), ValueError, "with at least one tap"),
        (changed(WEIGHTS, 0, lambda w: w[:, :, :0]), ValueError, "with at least one tap"),
        (changed(WEIGHTS, 1, lambda w: w[:3]), ValueError, r"weights\[1\] must be .16, 16, 3."),
        (changed(WEIGHTS, 1, lambda w: w.double()), TypeError, r"weights\[1\] is"),
        (changed(BIASES, 1, lambda w: w[:3]), ValueError, r"biases\[1\] must be .16,?."),
        (changed(GAINS, 3, lambda w: w[:3]), ValueError, r"norm_weights\[3\] must be .16,?."),
        (changed(SHIFTS, 0, lambda w: w.half()), TypeError, r"norm_biases\[0\] is"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_named(change, error, words, backend):
    partition = Partition(50, [10], [16, 6], 16)
    args = make(partition)
    change(args)
    with use_backend(backend), pytest.raises(error, match=words):
        functional.residual_stack(torch.zeros(2, 3, dtype=torch.int64), *args)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, "ids must be"),
        (torch.zeros(3, 0, dtype=torch.int64), ValueError, "length at least 1"),
        (torch.zeros(3, 2), TypeError, "ids must be int64"),
        (torch.zeros(3, 2, dtype=torch.int32), TypeError, r"convert with ids.long\(\)"),
        (torch.zeros(3, 2, dtype=torch.int64, device="meta"), ValueError, "ids are on meta, embeddings on cpu"),
        (torch.tensor([[1, 50]]), IndexError, "= 50 is outside 0..49"),
        (torch.tensor([[-1, 5]]), IndexError, "= -1 is outside 0..49"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_ids_are_named(ids, error, words, backend):
    args = make(Partition(50, [10], [16, 6], 16))
    with use_backend(backend), pytest.raises(error, match=words):
        functional.residual_stack(ids, *args)


def test_every_layer_of_a_long_stack_counts(cpu_isa):
    """Each place that the newest depends on is computed: a change anywhere in the receptive field shows, none outside."""
    partition = Partition.single(40, 16)
    args = make(partition, range(4), (1, 2, 1, 2))
    field = 1 + 2 * (1 + 2 + 1 + 2)
    ids = torch.randint(1, 39, (1, field + 4))
    expected = functional.residual_stack(ids, *args)
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[0, place] = 0
        same = torch.equal(functional.residual_stack(other, *args), expected)
        assert same == (place < 4), place
