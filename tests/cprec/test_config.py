import dataclasses
import json

import pytest

from cprec.model import NextItNetConfig
from cprec_kernels import Partition


def small(**options):
    return NextItNetConfig.from_plan(100, 16, [10, 30], [16, 4, 2], **options)


def test_defaults_and_derived_values():
    config = small(dilations=[1, 4], repeats=3)
    assert config.dilations == (1, 4)
    assert config.block_dilations == (1, 4, 1, 4, 1, 4)
    assert config.num_blocks == 6
    assert config.receptive_field == 1 + 2 * (1 + 2 + 4 + 8) * 3
    assert small(block="bottleneck", dilations=[1, 4]).receptive_field == 1 + 2 * (1 + 4)
    assert dataclasses.is_dataclass(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dropout = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dilations": []}, ValueError, "dilations is empty"),
        ({"dilations": [1, 0]}, ValueError, r"dilations\[1\] must be at least 1, got 0"),
        ({"dilations": [1, 2.0]}, TypeError, r"dilations\[1\] must be an integer, got 2.0"),
        ({"dilations": "124"}, TypeError, "dilations must be a list"),
        ({"dilations": 4}, TypeError, "dilations must be a list"),
        ({"repeats": 0}, ValueError, "repeats must be at least 1"),
        ({"repeats": True}, TypeError, "repeats must be an integer"),
        ({"kernel_size": -1}, ValueError, "kernel_size must be at least 1, got -1"),
        ({"block": "dense"}, ValueError, "block = 'dense' is not one of 'residual', 'bottleneck'"),
        ({"sharing": "all"}, ValueError, "sharing = 'all' is not one of"),
        ({"sharing": "adjacent-layer", "block": "bottleneck"}, ValueError, "use 'adjacent-block'"),
        ({"dropout": 1.0}, ValueError, r"dropout = 1.0 is outside \[0, 1\)"),
        ({"dropout": float("nan")}, ValueError, "dropout = nan"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing = -0.1"),
        ({"head_bias": 1}, TypeError, "head_bias must be true or false, got 1"),
        ({"tie_tails": "yes"}, TypeError, "tie_tails must be true or false, got 'yes'"),
        ({"tie_tails": True, "output_ranks": [16, 8, 4]}, ValueError, "one partition for embedding and softmax"),
        ({"tie_tails": True, "sparse_embedding": True}, ValueError, "turn off sparse_embedding"),
        ({"tie_tails": True, "tail_bias": "no"}, TypeError, "tail_bias must be true or false"),
        ({"colour": 1}, ValueError, "unknown keys in options: colour"),
    ],
)
def test_bad_values_are_named(options, error, words):
    with pytest.raises(error, match=words):
        small(**options)


def test_partitions_must_agree_with_the_model():
    good = Partition(100, [10], [16, 4], 16)
    values = {"num_items": 100, "embedding_dim": 16}
    with pytest.raises(ValueError, match=r"input_partition.num_items = 101 .*leave the padding item out"):
        NextItNetConfig(**values, input_partition=good.with_padding(), output_partition=good)
    with pytest.raises(ValueError, match=r"output_partition.embedding_dim = 8 but embedding_dim = 16"):
        NextItNetConfig(**values, input_partition=good, output_partition=Partition.single(100, 8))
    with pytest.raises(TypeError, match=r"output_partition must be a cprec_kernels.Partition, got tuple"):
        NextItNetConfig(**values, input_partition=good, output_partition=(10,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embedding_dim must be at least 2"):
        NextItNetConfig.from_plan(10, 1, block="bottleneck")


def test_from_plan():
    fractions = NextItNetConfig.from_plan(1000, 64, [0.05, 0.2], [64, 16, 4])
    assert fractions.input_partition == fractions.output_partition == Partition(1000, [50, 200], [64, 16, 4], 64)
    plain = NextItNetConfig.from_plan(1000, 64)
    assert plain.input_partition == plain.output_partition == Partition.single(1000, 64)
    split = NextItNetConfig.from_plan(1000, 64, [50, 200], [64, 16, 4], output_ranks=[32, 16, 8])
    assert split.input_partition.ranks == (64, 16, 4)
    assert split.output_partition == Partition(1000, [50, 200], [32, 16, 8], 64)
    other = NextItNetConfig.from_plan(1000, 64, output_cutoffs=[100], output_ranks=[64, 8])
    assert other.input_partition.num_clusters == 1
    assert other.output_partition.cutoffs == (100,)


@pytest.mark.parametrize(
    ("cutoffs", "ranks", "words"),
    [
        ([50, 0.2], [64, 16, 4], "mix item numbers and fractions"),
        ([50, 200], None, r"give ranks, the columns of each, e.g. \[64, 16, 4\]"),
        ([0.05, 1.5], [64, 16, 4], r"partition: fractions\[1\] = 1.5"),
        ([50, 5000], [64, 16, 4], r"partition: cutoffs\[1\] = 5000"),
        ([50], [64, 16, 4], "2 clusters, which need as many ranks"),
    ],
)
def test_from_plan_names_bad_input(cutoffs, ranks, words):
    with pytest.raises(ValueError, match=words):
        NextItNetConfig.from_plan(1000, 64, cutoffs, ranks)


def test_dict_round_trip_through_json():
    config = small(
        dilations=[1, 3], repeats=2, block="bottleneck", sharing="adjacent-block", dropout=0.25, head_bias=True,
        tail_bias=True, label_smoothing=0.1, sparse_embedding=True, kernel_size=2, output_ranks=[8, 4, 1],
    )  # fmt: skip
    assert NextItNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_accepts_missing_defaults_only():
    values = small().to_dict()
    del values["dropout"]
    assert NextItNetConfig.from_dict(values) == small()
    del values["output_partition"]
    with pytest.raises(ValueError, match="lacks output_partition"):
        NextItNetConfig.from_dict(values)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"format_version": 2}, ValueError, "format_version 2, but this cprec reads 1"),
        ({"format_version": None}, ValueError, "format_version None"),
        ({"dropuot": 0.1}, ValueError, "unknown keys in a model configuration: dropuot; known are .*dropout"),
        ({"input_partition": [1]}, TypeError, "input_partition must be a mapping"),
        ({"input_partition": {"num_items": 100}}, ValueError, r"input_partition: not a partition: missing keys"),
    ],
)
def test_from_dict_names_what_is_wrong(change, error, words):
    with pytest.raises(error, match=words):
        NextItNetConfig.from_dict({**small().to_dict(), **change})


def test_from_dict_rejects_a_non_mapping():
    with pytest.raises(TypeError, match="must be a mapping, got list"):
        NextItNetConfig.from_dict([])  # type: ignore[arg-type]


def test_tied_tails_are_counted_once_and_named_only_where_they_are():
    tied, apart = small(tie_tails=True, head_bias=True), small(head_bias=True)
    assert tied.shared_parameters == 20 * 4 + 70 * 2
    assert tied.num_parameters == apart.num_parameters - tied.shared_parameters
    assert tied.twin() == apart.twin()
    assert NextItNetConfig.from_dict(json.loads(json.dumps(tied.to_dict()))) == tied
    assert "tie_tails" not in apart.to_dict()
    with pytest.raises(ValueError, match=r"tails of lower rank than embedding_dim = 16, got ranks \[16, 16\]"):
        NextItNetConfig.from_plan(100, 16, [10], [16, 16], tie_tails=True)


def test_twin_differs_in_the_partitions_only():
    config = small(sharing="cross-block", dropout=0.1, head_bias=True)
    twin = config.twin()
    assert twin.input_partition == twin.output_partition == Partition.single(100, 16)
    same = {name: value for name, value in config.to_dict().items() if not name.endswith("partition")}
    assert same == {name: value for name, value in twin.to_dict().items() if not name.endswith("partition")}
