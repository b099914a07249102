"""cprec_kernels.compress: what does not fit is named and leaves the model as it was."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import cprec_kernels
from cprec_kernels import Partition
from cprec_kernels.convert import CompressionPlan
from cprec_kernels.nn import BlockEmbedding
from tests.convert.dense_models import ITEMS, PARTITION, WIDTH, GRULike


@pytest.mark.parametrize("options", [{"compression": 3}, {"partition": PARTITION}], ids=str)
def test_weights_that_are_not_finite_are_named(counts, options):
    for name, row, place in (("embed.0.weight", (5, 3), "[5, 3]"), ("out.bias", 7, "[7]")):
        model = GRULike()
        with torch.no_grad():
            model.get_parameter(name)[row] = torch.nan
        with pytest.raises(ValueError, match=re.escape(f"{name}{place} = nan: only finite weights")):
            cprec_kernels.compress(model, counts, **options)


def test_what_does_not_fit_is_named_and_changes_nothing(counts):
    model = GRULike()
    partition = {"partition": PARTITION}
    cases = [
        (counts, {}, "either compression= or partition="),
        (counts[1:], partition, r"0 embeddings have 90 rows, as many as counts; there are embed\.0 \(91\)"),
        (counts, {"partition": Partition.single(91, WIDTH)}, "is of 91 items and width 16, the model has 90 items"),
        (counts, {**partition, "classifier": "gru"}, "must be an nn.Linear, it is a GRU"),
        (counts, {**partition, "table": "out"}, "must be an nn.Embedding, it is a Linear"),
        (counts, {**partition, "padding_idx": 3}, "padding_idx = 3, but the item table declares 0"),
        (counts, {**partition, "padding_idx": 91}, "padding_idx = 91 is outside 0..90"),
        (counts, {**partition, "inputs": torch.randn(9, 15)}, r"inputs must be \(N, 16\) with N > 0, got shape \(9, 15\)"),
        (counts, {**partition, "inputs": torch.full((9, 16), torch.nan)}, "NaN or inf"),
        (counts * 0, partition, "all zero"),
        (counts - 20, partition, r"counts\[\d+\] = -\d+\.0 is not a count"),
        (counts[:, None], partition, "must be 1-D"),
    ]  # fmt: skip
    for given, options, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            cprec_kernels.compress(model, given, **options)
    assert isinstance(model.embed[0], nn.Embedding)
    assert isinstance(model.out, nn.Linear)
    model.second = nn.Linear(WIDTH, ITEMS)
    with pytest.raises(ValueError, match="several linear layers have one output per item: out, second"):
        cprec_kernels.compress(model, counts, **partition)
    model.embed[0].max_norm = 1.0
    with pytest.raises(ValueError, match="uses max_norm"):
        cprec_kernels.compress(model, counts, **partition)
    model.embed[0].max_norm, model.embed[0].scale_grad_by_freq = None, True
    with pytest.raises(ValueError, match="uses scale_grad_by_freq"):
        cprec_kernels.compress(model, counts, **partition)
    with pytest.raises(ValueError, match=r"counts has 90 entries, but table 'embed\.0' has 91 rows"):
        cprec_kernels.compress(GRULike(), counts[1:], table="embed.0", **partition)
    with pytest.raises(ValueError, match="the model is the table itself: it cannot be replaced in place"):
        cprec_kernels.compress(nn.Embedding(91, WIDTH), counts, **partition)


def test_a_plan_of_something_else_is_refused(counts, tmp_path):
    report = cprec_kernels.compress(GRULike(), counts, partition=PARTITION)
    values = report.plan.to_dict()
    assert CompressionPlan.from_dict(values) == report.plan
    with pytest.raises(
        ValueError, match=r"not a compression plan: missing keys \['table'\], unknown keys \['tables'\]"
    ):
        CompressionPlan.from_dict({"tables" if name == "table" else name: value for name, value in values.items()})
    BlockEmbedding(PARTITION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a BlockEmbedding, not a compressed model"):
        CompressionPlan.load_pretrained(GRULike(), tmp_path)


def test_a_third_module_that_shares_the_table_is_not_left_behind(counts):
    model = GRULike()
    model.decoder = nn.Module()
    model.decoder.register_parameter("table", model.embed[0].weight)
    with pytest.raises(ValueError, match=r"decoder\.table is the same parameter as the item table's"):
        cprec_kernels.compress(model, counts, partition=PARTITION)
    assert isinstance(model.embed[0], nn.Embedding)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), self.weight)


def test_modules_that_do_more_than_their_class_are_refused(counts):
    """A block embedding would look rows up and leave out the rest without a word."""

    def refused(model, message):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=message):
            cprec_kernels.compress(model, counts, partition=PARTITION)
        assert {name: type(module) for name, module in model.named_modules()} == before

    model = GRULike()
    model.embed[0].__class__ = Scaled
    refused(model, r"table 'embed\.0' is a Scaled with a forward of its own")
    model = GRULike()
    model.out.__class__ = Cosine
    refused(model, "classifier 'out' is a Cosine with a forward of its own")
    model = GRULike()
    handle = model.embed[0].register_forward_hook(lambda module, args, output: output * 4)
    refused(model, r"table 'embed\.0' has forward hooks")
    handle.remove()
    handle = model.out.register_forward_pre_hook(lambda module, args: (args[0] * 4,))
    refused(model, "classifier 'out' has forward hooks")
    handle.remove()
    model.out.forward = lambda x: nn.functional.linear(4 * x, model.out.weight)
    refused(model, "classifier 'out' is a Linear with a forward of its own")
    del model.out.forward
    cprec_kernels.compress(model, counts, partition=PARTITION)


def test_a_model_that_is_compressed_already_is_named(counts):
    model = GRULike()
    report = cprec_kernels.compress(model, counts, partition=PARTITION)
    with pytest.raises(ValueError, match=r"embed\.0 is compressed already"):
        cprec_kernels.compress(model, counts, partition=PARTITION)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got CompressionReport"):
        cprec_kernels.compress(report, counts, partition=PARTITION)
