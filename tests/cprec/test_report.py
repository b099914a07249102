import io
import json

import pytest
import torch
from rich.console import Console

from cprec.model import NextItNet, NextItNetConfig
from cprec.model.sharing import BLOCK_KINDS, SHARINGS
from cprec.report import format_bytes, parameter_table

PLANS = [
    {},
    {"cutoffs": [10, 30], "ranks": [16, 4, 1], "head_bias": True, "tail_bias": True},
    {"cutoffs": [1, 99], "ranks": [8, 3, 3], "head_bias": True},
    {"cutoffs": [10], "ranks": [16, 16], "output_ranks": [5, 2], "tail_bias": True},
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("block", BLOCK_KINDS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_rows_add_up_to_the_parameters_of_the_model(plan, block, sharing):
    if (block, sharing) == ("bottleneck", "adjacent-layer"):
        sharing = "adjacent-block"
    config = NextItNetConfig.from_plan(100, 16, **plan, block=block, sharing=sharing, dilations=[1, 2, 4])
    model = NextItNet(config)
    table = parameter_table(model)
    assert table == parameter_table(config)
    actual = {
        "embedding": sum(parameter.numel() for parameter in model.embedding.parameters()),
        "backbone": sum(parameter.numel() for parameter in model.backbone.parameters()),
        "softmax": sum(parameter.numel() for parameter in model.softmax.parameters()),
    }
    assert table.subtotals() == actual
    assert table.parameters == sum(actual.values()) == config.num_parameters
    assert table.twin_parameters == sum(parameter.numel() for parameter in NextItNet(config.twin()).parameters())
    for row, parameter in zip(table.rows, model.embedding.embeddings, strict=False):
        assert row.parameters == parameter.numel()


def test_shared_blocks_own_nothing_and_say_whose_weights_they_use():
    config = NextItNetConfig.from_plan(100, 16, sharing="adjacent-block", dilations=[1, 2, 4])
    rows = {row.name: row for row in parameter_table(config).rows}
    assert rows["block 0"].parameters == rows["block 2"].parameters == 2 * (3 * 16 * 16 + 16)
    assert rows["block 1"].parameters == 0
    assert rows["block 1"].detail == "dilations 2, 4, weights of block 0"
    assert rows["layer norms"].parameters == 3 * 4 * 16


def test_compression_against_the_twins():
    config = NextItNetConfig.from_plan(10_000, 64, [500, 2000], [64, 16, 4], sharing="cross-layer")
    table = parameter_table(config)
    assert table.compression == config.twin().num_parameters / config.num_parameters > 4
    assert table.unshared_compression > table.compression
    assert parameter_table(config.twin()).compression == 1.0


def test_bytes_follow_the_dtype():
    config = NextItNetConfig.from_plan(100, 16)
    model = NextItNet(config).to(torch.bfloat16)
    assert parameter_table(model).total_bytes == 2 * config.num_parameters
    assert parameter_table(config).total_bytes == 4 * config.num_parameters


def test_dict_is_json_and_shares_add_up():
    table = parameter_table(NextItNetConfig.from_plan(100, 16, [10], [16, 4]))
    values = json.loads(json.dumps(table.to_dict()))
    assert sum(row["share"] for row in values["rows"]) == pytest.approx(1)
    assert sum(row["bytes"] for row in values["rows"]) == values["bytes"] == 4 * values["parameters"]
    assert values["groups"] == table.subtotals()


def test_rendering_shows_every_row_and_the_ratio():
    config = NextItNetConfig.from_plan(100, 16, [10], [16, 4], sharing="cross-block", head_bias=True)
    table = parameter_table(config)
    console = Console(file=io.StringIO(), width=200)
    console.print(table.render())
    text = console.file.getvalue()
    for row in table.rows:
        for words in (f"{row.name} ", row.detail, f"{row.parameters:,}"):
            assert words in text
    assert f"{table.parameters:,}" in text
    assert f"compression {table.compression:.2f}x" in text
    assert f"compression {table.unshared_compression:.2f}x" in text


def test_the_printed_shares_are_those_of_this_model():
    table = parameter_table(NextItNetConfig.from_plan(100, 16, [10], [16, 4]))
    console = Console(file=io.StringIO(), width=200)
    console.print(table.render())
    printed = {line.split()[0]: line.split()[-1] for line in console.file.getvalue().splitlines() if line.strip()}
    for group, parameters in table.subtotals().items():
        assert printed[group] == f"{parameters / table.parameters:.1%}"
    assert printed["total"] == "100.0%"


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 999, 1000, 999_400, 999_600, 2_560_000_000)] == [
        "0 B", "999 B", "1 kB", "999 kB", "1 MB", "2.56 GB",
    ]  # fmt: skip


def test_wrong_type():
    with pytest.raises(TypeError, match="got dict"):
        parameter_table({})  # type: ignore[arg-type]
