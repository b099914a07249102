"""Item vectors in block embeddings and clustered softmaxes: what is kept exactly, what is the best low rank, what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from cprec_kernels import Partition
from cprec_kernels.convert import set_item_vectors
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks

K, D = 60, 8
PARTITIONS = [
    Partition(K, [10, 25], [8, 3, 1], D),
    Partition(K, [10, 25], [4, 3, 1], D),  # the head is narrow, too
    Partition(K, [10], [8, 8], D),
    Partition(K, [], [8], D),
    Partition(K, [K - 1], [8, 2], D),  # a tail of one item
]
IDS = ["-".join(map(str, partition.ranks)) + f"/{partition.sizes[-1]}" for partition in PARTITIONS]
COUNTS = torch.tensor([max(0, 500 // (place + 1) - 9) for place in range(K)])  # the rarest were never seen


def vectors(seed=0):
    return torch.randn(K, D, generator=torch.Generator().manual_seed(seed))


def low_rank(partition, seed=0):
    """Vectors that every cluster can hold exactly."""
    out = vectors(seed)
    for rank, (lo, hi) in zip(partition.ranks, itertools.pairwise(partition.offsets), strict=True):
        left, values, right = torch.linalg.svd(out[lo:hi].double(), full_matrices=False)
        out[lo:hi] = (left[:, :rank] * values[:rank] @ right[:rank]).float()
    return out


def poisoned(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    return module


def weighted_svd(rows, rank, counts):
    """The best rows of a rank, in fp64, by numpy's way: scale, cut, and project the rows on what is left."""
    rows = rows.double()
    weights = counts.double().clamp(min=1).sqrt()[:, None]
    _, _, right = torch.linalg.svd(rows * weights)
    return rows @ right[:rank].T @ right[:rank]


@pytest.mark.parametrize("partition", PARTITIONS, ids=IDS)
@pytest.mark.parametrize("padding", [False, True])
def test_embedding_is_the_best_of_each_rank(partition, padding):
    inputs = vectors()
    module = BlockEmbedding(partition.with_padding() if padding else partition, padding_idx=K if padding else None)
    errors = set_item_vectors(poisoned(module), COUNTS, inputs=inputs)
    found = module(torch.arange(K)).double()
    for j, (lo, hi) in enumerate(itertools.pairwise(partition.offsets)):
        best = weighted_svd(inputs[lo:hi], partition.ranks[j], COUNTS[lo:hi])
        torch.testing.assert_close(found[lo:hi], best, rtol=1e-5, atol=1e-5)
        weights = COUNTS[lo:hi].double().clamp(min=1).sqrt()[:, None]
        lost = ((best - inputs[lo:hi]) * weights).norm() / (inputs[lo:hi] * weights).norm()
        assert errors[j] == pytest.approx(float(lost), abs=1e-6)
    if padding:
        assert not module(torch.tensor([K])).any()


def test_rows_of_projected_clusters_are_as_long_as_fresh_ones():
    module = BlockEmbedding(PARTITIONS[0])
    set_item_vectors(module, COUNTS, inputs=1000 * vectors())
    for table in list(module.embeddings)[1:]:
        assert float(table.detach().square().sum(1).mean()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("where", [0, 30, K - 1])
def test_padding_may_be_any_id(where):
    module = BlockEmbedding(PARTITIONS[0], padding_idx=where)
    inputs = vectors() if where < K - 1 else vectors()[:-1]
    set_item_vectors(module, COUNTS[: len(inputs)], inputs=inputs)
    assert not module(torch.tensor([where])).any()
    assert module(torch.tensor([5])).detach().equal(inputs[5:6])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("partition", PARTITIONS, ids=IDS)
def test_softmax_of_exact_vectors(partition, bias):
    # Around their mean, the rows of a tail of rank r have one of r at most when the mean lies among them: here they all do.
    module = ClusteredSoftmaxWithLoss(D, partition, head_bias=bias, tail_bias=bias)
    outputs = low_rank(partition)
    errors = set_item_vectors(poisoned(module), COUNTS, outputs=outputs)
    hidden = torch.randn(7, D)
    got = module.log_prob(hidden).double().detach()
    logits = hidden.double() @ outputs.double().T
    for lo, hi in itertools.islice(itertools.pairwise(partition.offsets), 1, None):
        within = logits[:, lo:hi].log_softmax(1)
        torch.testing.assert_close(got[:, lo:hi].log_softmax(1), within, rtol=1e-4, atol=1e-4)
    if 0 not in partition.projected:
        head = logits[:, : partition.sizes[0]]
        torch.testing.assert_close(
            got[:, : partition.sizes[0]].log_softmax(1), head.log_softmax(1), rtol=1e-4, atol=1e-4
        )
        assert max(errors) < 1e-5
        for tail, (lo, hi) in enumerate(itertools.pairwise(partition.offsets[1:])):
            shares = COUNTS[lo:hi].double()
            shares = shares / shares.sum() if shares.sum() else torch.full_like(shares, 1 / len(shares))
            entropy = -float(torch.xlogy(shares, shares).sum()) if bias else 0.0
            parent = logits[:, lo:hi] @ shares + entropy
            # log p(tail) - log p(item 0) is the parent's logit less the item's
            odds = got[:, lo:hi].logsumexp(1) - got[:, 0]
            torch.testing.assert_close(odds, parent - logits[:, 0], rtol=1e-4, atol=1e-4, msg=f"tail {tail}")


def test_output_vectors_of_a_tail_stand_around_its_label():
    head = ClusteredSoftmaxWithLoss(D, Partition(K, [10, 25], [D] * 3, D), head_bias=True)
    outputs = vectors()
    set_item_vectors(head, COUNTS, outputs=outputs)
    for j, (lo, hi) in enumerate(((10, 25), (25, K)), start=1):
        label = head.weights[0][9 + j]
        torch.testing.assert_close(label, COUNTS[lo:hi] / COUNTS[lo:hi].sum() @ outputs[lo:hi])
        torch.testing.assert_close(head.weights[j], outputs[lo:hi] - label)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("partition", PARTITIONS[:3], ids=IDS[:3])
def test_tied_tails_hold_both_kinds_of_vectors(partition, padding):
    partition = Partition(
        K, partition.cutoffs, [min(rank, 6) if j else rank for j, rank in enumerate(partition.ranks)], D
    )
    module = poisoned(TiedBlocks(partition, padding=padding, tie_projections=False, tie_head=False))
    # both kinds of a rank that their shared rows can hold: codes times a map for each role
    inputs, outputs = vectors(), vectors(1)
    for rank, (lo, hi) in itertools.islice(
        zip(partition.ranks, itertools.pairwise(partition.offsets), strict=True), 1, None
    ):
        codes = torch.randn(hi - lo, rank)
        codes -= (COUNTS[lo:hi].float() / max(1, int(COUNTS[lo:hi].sum()))) @ codes  # so that centring keeps the rank
        inputs[lo:hi], outputs[lo:hi] = 50 * codes @ torch.randn(rank, D), 0.1 * codes @ torch.randn(rank, D)
    errors = set_item_vectors(module, COUNTS, inputs=inputs, outputs=outputs)
    torch.testing.assert_close(
        module.embedding(torch.arange(K)).detach()[partition.sizes[0] :],
        inputs[partition.sizes[0] :],
        rtol=1e-3,
        atol=1e-3,
    )
    hidden = torch.randn(7, D)
    got, logits = module.log_prob(hidden).detach(), hidden @ outputs.T
    for lo, hi in itertools.pairwise(partition.offsets[1:]):
        torch.testing.assert_close(got[:, lo:hi].log_softmax(1), logits[:, lo:hi].log_softmax(1), rtol=1e-3, atol=1e-3)
    assert max(errors[1:]) < 1e-3
    if padding:
        assert not module.embedding(torch.tensor([K])).any()


@pytest.mark.parametrize("partition", PARTITIONS, ids=IDS)
def test_one_vector_in_both_roles(partition):
    module = poisoned(TiedBlocks(partition, padding=True, head_bias=True, tail_bias=True))
    inputs = vectors()
    set_item_vectors(module, COUNTS, inputs=inputs)
    found = module.embedding(torch.arange(K)).detach()
    hidden = torch.randn(7, D)
    for j, (lo, hi) in enumerate(itertools.pairwise(partition.offsets)):
        if j:
            torch.testing.assert_close(
                found[lo:hi].double(),
                weighted_svd(inputs[lo:hi], partition.ranks[j], COUNTS[lo:hi]),
                rtol=1e-4,
                atol=1e-4,
            )
        got = module.log_prob(hidden).detach()[:, lo:hi].log_softmax(1)
        torch.testing.assert_close(got, (hidden @ found[lo:hi].T).log_softmax(1), rtol=1e-4, atol=1e-4)


def test_a_narrow_type_is_kept():
    module = BlockEmbedding(PARTITIONS[0], dtype=torch.bfloat16)
    set_item_vectors(module, COUNTS, inputs=vectors().double())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(module(torch.arange(10)).detach(), vectors()[:10].bfloat16())


@pytest.mark.parametrize(
    ("make", "given", "error", "words"),
    [
        (lambda: BlockEmbedding(PARTITIONS[0]), {}, TypeError, "takes inputs, got neither"),
        (lambda: BlockEmbedding(PARTITIONS[0]), {"outputs": vectors()}, TypeError, "takes inputs, got outputs"),
        (
            lambda: ClusteredSoftmaxWithLoss(D, PARTITIONS[0]), {"inputs": vectors(), "outputs": vectors()}, TypeError,
            "takes outputs, got inputs and outputs",
        ),
        (
            lambda: TiedBlocks(PARTITIONS[0], tie_projections=False, tie_head=False), {"inputs": vectors()}, TypeError,
            "takes inputs and outputs, got inputs",
        ),
        (
            lambda: TiedBlocks(PARTITIONS[0], tie_projections=False), {"inputs": vectors()}, ValueError,
            "tie_head=True and tie_projections=False",
        ),
        (lambda: torch.nn.Embedding(K, D), {"inputs": vectors()}, TypeError, "got Embedding"),
        (lambda: BlockEmbedding(PARTITIONS[0]), {"inputs": vectors()[:-1]}, ValueError, r"shape \(60, 8\), got \(59, 8\)"),
        (lambda: BlockEmbedding(PARTITIONS[0]), {"inputs": vectors().long()}, TypeError, "got torch.int64"),
        (lambda: BlockEmbedding(PARTITIONS[0]), {"inputs": vectors().tolist()}, TypeError, "got list"),
        (
            lambda: BlockEmbedding(PARTITIONS[0]),
            {"inputs": vectors().index_fill(0, torch.tensor([7]), torch.nan)}, ValueError, r"inputs\[7\] is not finite",
        ),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong_and_change_nothing(make, given, error, words):
    module = make()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(error, match=words):
        set_item_vectors(module, COUNTS, **given)
    assert all(a.equal(b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (COUNTS[:-1], r"shape \(60,\), got \(59,\)"),
        (COUNTS.float().index_fill(0, torch.tensor([3]), -1.0), r"counts\[3\] = -1.0"),
        (COUNTS.float().index_fill(0, torch.tensor([4]), torch.inf), r"counts\[4\] = inf"),
    ],
)
def test_counts_that_are_none(counts, words):
    with pytest.raises(ValueError, match=words):
        set_item_vectors(BlockEmbedding(PARTITIONS[0]), counts, inputs=vectors())


def test_a_cluster_of_nothing_but_the_padding_embeds_to_zero():
    module = BlockEmbedding(Partition(10, [4, 9], [8, 4, 2], 8), padding_idx=9)
    errors = set_item_vectors(module, torch.ones(9), inputs=torch.randn(9, 8))
    assert errors[2] == 0
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert torch.count_nonzero(module(torch.tensor([9]))) == 0
