"""Checkpoints of fairseq and Transformer-XL, by their layout: outputs as those modules compute them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from cprec_kernels import Partition
from cprec_kernels.convert import (
    from_fairseq_adaptive_input,
    from_fairseq_adaptive_softmax,
    from_transformer_xl_embedding,
    from_transformer_xl_softmax,
)
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss

WIDTH, SIZES = 16, [7, 13, 40]
BOUNDS = [0, *itertools.accumulate(SIZES)]
IDS = torch.arange(sum(SIZES))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def levels_log_prob(head, tails):
    """(N, K) from head logits (N, k_0 + n - 1) and tail logits, tail i under label i."""
    head = head.log_softmax(1)
    blocks = [head[:, : SIZES[0]]]
    blocks += [head[:, SIZES[0] + i, None] + tail.log_softmax(1) for i, tail in enumerate(tails)]
    return torch.cat(blocks, 1)


# fairseq


def fairseq_input(dims, width=WIDTH):
    state = {"embed._float_tensor": torch.zeros(1)}
    for i, (size, dim) in enumerate(zip(SIZES, dims, strict=True)):
        state |= {
            f"embed.embeddings.{i}.0.weight": randn(size, dim),
            f"embed.embeddings.{i}.1.weight": randn(width, dim),
        }
    return state


@pytest.mark.parametrize("dims", [(12, 6, 2), (16, 8, 4), (20, 16, 4)], ids=str)
def test_a_fairseq_input(dims):
    state = fairseq_input(dims)
    layout = from_fairseq_adaptive_input(state, "embed.")
    embedding = BlockEmbedding.from_factors(*layout, padding_idx=1)
    assert embedding.partition == Partition(60, BOUNDS[1:-1], [min(dim, WIDTH) for dim in dims], WIDTH)
    expected = torch.cat(
        [state[f"embed.embeddings.{i}.0.weight"] @ state[f"embed.embeddings.{i}.1.weight"].T for i in range(3)]
    )
    torch.testing.assert_close(embedding(IDS), expected)


@pytest.mark.parametrize("ranks", [(8, 4), (16, 16)], ids=str)
def test_a_fairseq_softmax(ranks):
    state = {"soft.version": torch.tensor([1]), "soft.head.weight": randn(SIZES[0] + 2, WIDTH)}
    for i, rank in enumerate(ranks):
        state |= {f"soft.tail.{i}.0.weight": randn(rank, WIDTH), f"soft.tail.{i}.2.weight": randn(SIZES[i + 1], rank)}
    hidden = randn(9, WIDTH)
    tails = [hidden @ state[f"soft.tail.{i}.0.weight"].T @ state[f"soft.tail.{i}.2.weight"].T for i in range(2)]
    expected = levels_log_prob(hidden @ state["soft.head.weight"].T, tails)
    layout = from_fairseq_adaptive_softmax(state, "soft.", tie_proj=False if ranks[0] == WIDTH else None)
    softmax = ClusteredSoftmaxWithLoss.from_factors(*layout)
    torch.testing.assert_close(softmax.log_prob(hidden), expected)
    if ranks[0] == WIDTH:
        with pytest.raises(ValueError, match="is square: say tie_proj"):
            from_fairseq_adaptive_softmax(state, "soft.")


@pytest.mark.parametrize("first", [16, 12], ids=["as wide", "narrower"])
@pytest.mark.parametrize("tie_proj", [True, False])
def test_a_fairseq_softmax_tied_to_its_input(first, tie_proj):
    dims = (first, 6, 2)
    inputs = fairseq_input(dims)
    tables = [inputs[f"embed.embeddings.{i}.0.weight"] for i in range(3)]
    state = {
        "version": torch.tensor([1]),
        "head._float_tensor": torch.zeros(1),
        "head.class_proj.weight": randn(2, WIDTH),
    }
    hidden = randn(9, WIDTH)
    if first == WIDTH:
        state["head.word_proj.weight"], words = tables[0], hidden
    else:
        state |= {"head.word_proj.0.weight": randn(first, WIDTH), "head.word_proj.1.weight": tables[0]}
        words = hidden @ state["head.word_proj.0.weight"].T
    tails = []
    for i in (0, 1):
        state[f"tail.{i}.2.weight"] = tables[i + 1]
        if tie_proj:
            state[f"tail.{i}.0.weight"] = inputs[f"embed.embeddings.{i + 1}.1.weight"]
            narrow = hidden @ state[f"tail.{i}.0.weight"]
        else:
            state[f"tail.{i}.0.weight"] = randn(dims[i + 1], WIDTH)
            narrow = hidden @ state[f"tail.{i}.0.weight"].T
        tails.append(narrow @ tables[i + 1].T)
    head = torch.cat([words @ tables[0].T, hidden @ state["head.class_proj.weight"].T], 1)
    softmax = ClusteredSoftmaxWithLoss.from_factors(*from_fairseq_adaptive_softmax(state))
    torch.testing.assert_close(softmax.log_prob(hidden), levels_log_prob(head, tails))


def test_what_is_not_fairseqs_is_named():
    with pytest.raises(ValueError, match=r"lacks 'version'.*label before their own"):
        from_fairseq_adaptive_softmax({"head.weight": randn(9, 16)})
    with pytest.raises(ValueError, match=r"lacks 'embeddings\.0\.0\.weight'"):
        from_fairseq_adaptive_input({"weight": randn(9, 16)})
    with pytest.raises(ValueError, match=r"lacks 'head\.class_proj\.weight'"):
        from_fairseq_adaptive_softmax({"version": torch.tensor([1])})
    state = fairseq_input((4, 8, 2))
    with pytest.raises(ValueError, match="ranks must not increase"):
        from_fairseq_adaptive_input(state, "embed.")
    state["embed.embeddings.2.1.weight"] = randn(15, 2)
    with pytest.raises(ValueError, match=r"different widths: \[16, 16, 15\]"):
        from_fairseq_adaptive_input(state, "embed.")
    tail = {"tail.0.0.weight": randn(3, 3), "tail.0.2.weight": randn(5, 4)}
    with pytest.raises(ValueError, match=r"'tail\.0\.0\.weight' must be \(4, 16\) or its transpose, got \(3, 3\)"):
        from_fairseq_adaptive_softmax({"version": torch.tensor([1]), "head.weight": randn(9, 16), **tail})
    tail["tail.0.0.weight"] = randn(4, 16)
    with pytest.raises(ValueError, match=r"the head of .* has 1 rows for 1 tails"):
        from_fairseq_adaptive_softmax({"version": torch.tensor([1]), "head.weight": randn(1, 16), **tail})


# Transformer-XL


def xl_softmax(dims, width, projected):
    """Parameters with ``div_val`` > 1 if dims differ, else one table of all words."""
    state = {"crit.cluster_weight": randn(2, dims[0]), "crit.cluster_bias": randn(2)}
    tables = [(randn(size, dim), randn(size)) for size, dim in zip(SIZES, dims, strict=True)]
    if len(set(dims)) == 1:
        state |= {
            "crit.out_layers.0.weight": torch.cat([table for table, _ in tables]),
            "crit.out_layers.0.bias": torch.cat([bias for _, bias in tables]),
        }
    else:
        for i, (table, bias) in enumerate(tables):
            state |= {f"crit.out_layers.{i}.weight": table, f"crit.out_layers.{i}.bias": bias}
    projections = [randn(width, dim) if projected else torch.eye(width, dtype=torch.float64) for dim in dims]
    if projected:
        state |= {f"crit.out_projs.{i}": projection for i, projection in enumerate(projections)}
    return state, tables, projections


@pytest.mark.parametrize("parents", ["forward", "reversed"])
@pytest.mark.parametrize(
    ("dims", "projected"), [((16, 4, 1), True), ((16, 16, 16), False), ((8, 8, 8), True), ((12, 6, 3), True)], ids=str
)
def test_a_transformer_xl_softmax(dims, projected, parents):
    state, tables, projections = xl_softmax(dims, WIDTH, projected)
    hidden = randn(9, WIDTH)
    logits = [hidden @ q @ table.T + bias for (table, bias), q in zip(tables, projections, strict=True)]
    labels = hidden @ projections[0] @ state["crit.cluster_weight"].T + state["crit.cluster_bias"]
    labels = labels if parents == "forward" else labels.flip(1)  # tail i reads column -i of the head
    expected = levels_log_prob(torch.cat([logits[0], labels], 1), logits[1:])
    cutoffs = BOUNDS[1:-1] if len(set(dims)) == 1 else None
    layout = from_transformer_xl_softmax(state, "crit.", cutoffs=cutoffs, parents=parents)
    softmax = ClusteredSoftmaxWithLoss.from_factors(*layout)
    assert softmax.partition.cutoffs == tuple(BOUNDS[1:-1])
    torch.testing.assert_close(softmax.log_prob(hidden), expected)
    target = torch.randint(60, (9,))
    torch.testing.assert_close(softmax(hidden, target).output, expected.gather(1, target[:, None])[:, 0])


def test_a_transformer_xl_softmax_of_one_cluster():
    state = {"out_layers.0.weight": randn(60, WIDTH), "out_layers.0.bias": randn(60)}
    softmax = ClusteredSoftmaxWithLoss.from_factors(*from_transformer_xl_softmax(state))
    hidden = randn(5, WIDTH)
    expected = F.linear(hidden, *state.values()).log_softmax(1)
    torch.testing.assert_close(softmax.log_prob(hidden), expected)


@pytest.mark.parametrize("dims", [(16, 4, 1), (8, 2, 1)], ids=str)
def test_a_transformer_xl_embedding(dims):
    state = {}
    for i, (size, dim) in enumerate(zip(SIZES, dims, strict=True)):
        state |= {f"word_emb.emb_layers.{i}.weight": randn(size, dim), f"word_emb.emb_projs.{i}": randn(WIDTH, dim)}
    embedding = BlockEmbedding.from_factors(*from_transformer_xl_embedding(state, "word_emb."))
    rows = [state[f"word_emb.emb_layers.{i}.weight"] @ state[f"word_emb.emb_projs.{i}"].T for i in range(3)]
    torch.testing.assert_close(embedding(IDS), torch.cat(rows) * WIDTH**0.5)
    plain = BlockEmbedding.from_factors(*from_transformer_xl_embedding(state, "word_emb.", scaled=False))
    torch.testing.assert_close(plain(IDS), torch.cat(rows))


@pytest.mark.parametrize("projected", [True, False])
def test_a_transformer_xl_embedding_with_one_table(projected):
    state = {"emb_layers.0.weight": randn(60, 8 if projected else WIDTH)}
    rows = state["emb_layers.0.weight"]
    if projected:
        state["emb_projs.0"] = randn(WIDTH, 8)
        rows = rows @ state["emb_projs.0"].T
    embedding = BlockEmbedding.from_factors(*from_transformer_xl_embedding(state))
    torch.testing.assert_close(embedding(IDS), rows * WIDTH**0.5)


def test_what_a_transformer_xl_checkpoint_does_not_show_has_to_be_said():
    state, _, _ = xl_softmax((16, 4, 1), WIDTH, True)
    with pytest.raises(ValueError, match="parents='reversed' for a checkpoint of kimiyoung"):
        from_transformer_xl_softmax(state, "crit.")
    with pytest.raises(ValueError, match=r"cutoffs are \[7, 21\], but the tables of .* hold \[7, 13, 40\]"):
        from_transformer_xl_softmax(state, "crit.", cutoffs=[7, 21], parents="forward")
    del state["crit.out_projs.0"]
    with pytest.raises(ValueError, match=r"lacks 'crit\.out_projs\.0'"):
        from_transformer_xl_softmax(state, "crit.", parents="forward")
    state, _, _ = xl_softmax((16, 16, 16), WIDTH, False)
    with pytest.raises(ValueError, match=r"pass the 2 cutoffs .* got None"):
        from_transformer_xl_softmax(state, "crit.", parents="forward")
    with pytest.raises(ValueError, match=r"cutoffs\[1\] = 60 is outside"):
        from_transformer_xl_softmax(state, "crit.", cutoffs=[7, 60], parents="forward")
    state["crit.cluster_weight"] = randn(3, 16)
    with pytest.raises(ValueError, match="pass the 3 cutoffs"):
        from_transformer_xl_softmax(state, "crit.", cutoffs=[7, 20], parents="forward")
    state, _, _ = xl_softmax((16, 4, 1), WIDTH, True)
    state["crit.cluster_weight"], state["crit.cluster_bias"] = randn(3, 16), randn(3)
    with pytest.raises(ValueError, match="has 3 tables and 3 parent labels: one less than tables is needed"):
        from_transformer_xl_softmax(state, "crit.", parents="forward")


def test_factors_that_do_not_fit_are_named():
    partition, state = from_transformer_xl_embedding({"emb_layers.0.weight": randn(60, 16)})
    with pytest.raises(ValueError, match=r"(?s)do not fit the partition.*size mismatch for embeddings\.0"):
        BlockEmbedding.from_factors(Partition.single(61, 16), state)
    with pytest.raises(ValueError, match=r"lacks 'embeddings\.0'"):
        BlockEmbedding.from_factors(partition, {})
    with pytest.raises(ValueError, match=r"lacks 'weights\.0'"):
        ClusteredSoftmaxWithLoss.from_factors(partition, state)
