"""Modules as folders with config.json and model.safetensors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

import cprec_kernels
from cprec_kernels import Partition
from cprec_kernels.convert import CompressionPlan
from cprec_kernels.nn import BlockEmbedding, ClusteredSoftmaxWithLoss, TiedBlocks

PARTITION = Partition(60, [10, 30], [16, 6, 3], 16)
IDS = torch.arange(60)

MODULES = {
    "embedding": lambda: BlockEmbedding(PARTITION.with_padding(), padding_idx=-1, sparse=True),
    "softmax": lambda: ClusteredSoftmaxWithLoss(
        16,
        PARTITION,
        head_bias=True,
        tail_bias=True,
        ignore_index=-1,
        reduction="sum",
        label_smoothing=0.1,
        z_loss=0.01,
    ),
    "plain softmax": lambda: ClusteredSoftmaxWithLoss(16, Partition.single(60, 16)),
    "half": lambda: ClusteredSoftmaxWithLoss(16, PARTITION, dtype=torch.bfloat16),
    "tied": lambda: TiedBlocks(PARTITION, padding=True, head_bias=True),
    "loosely tied": lambda: TiedBlocks(PARTITION, tie_projections=False, tail_bias=True),
    "tied tails": lambda: TiedBlocks(PARTITION, padding=True, tie_projections=False, tie_head=False),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_comes_back_as_it_was(kind, tmp_path):
    module = MODULES[kind]()
    folder = module.save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = type(module).from_pretrained(folder)
    assert repr(loaded) == repr(module)
    assert not loaded.training
    state = loaded.state_dict()
    assert list(state) == list(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].dtype == tensor.dtype
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    module.save_pretrained(folder)  # once more over itself


def test_the_files_are_what_others_can_read(tmp_path):
    from safetensors.torch import load_file

    module = MODULES["softmax"]()
    module.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == module.state_dict().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["module"] == "ClusteredSoftmaxWithLoss"
    assert config["partition"] == PARTITION.to_dict()


def test_folders_that_are_not_whole_are_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    softmax = MODULES["softmax"]()
    softmax.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a ClusteredSoftmaxWithLoss, not a TiedBlocks"):
        TiedBlocks.from_pretrained(tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}

    def broken(name, content):
        for key, value in good.items():
            (tmp_path / key).write_bytes(value)
        (tmp_path / name).write_bytes(content)
        return ClusteredSoftmaxWithLoss.from_pretrained(tmp_path)

    with pytest.raises(ValueError, match="not a whole safetensors file"):
        broken("model.safetensors", good["model.safetensors"][:-7])
    with pytest.raises(ValueError, match=r"was not saved with this config\.json"):
        broken("config.json", good["config.json"].replace(b'"sum"', b'"none"'))
    with pytest.raises(ValueError, match="is not JSON"):
        broken("config.json", b"{")
    with pytest.raises(ValueError, match='its "format" is None'):
        broken("config.json", b"{}")
    with pytest.raises(ValueError, match="has format_version 2"):
        broken("config.json", good["config.json"].replace(b'"format_version": 1', b'"format_version": 2'))
    weights = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        about = file.metadata()
    for name, value, message in (
        ("weights.0", weights["weights.0"].double(), "the tensors have several dtypes"),
        (
            "weights.0",
            weights["weights.0"][1:].clone(),
            r"(?s)model\.safetensors does not fit its configuration.*weights\.0",
        ),
    ):
        save_file({**weights, name: value}, tmp_path / "other", about)
        with pytest.raises(ValueError, match=message):
            broken("model.safetensors", (tmp_path / "other").read_bytes())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        ClusteredSoftmaxWithLoss.from_pretrained(tmp_path)


def test_what_is_not_ours_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match="is not of cprec-kernels"):
        MODULES["tied"]().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(FileExistsError, match="is a file"):
        MODULES["tied"]().save_pretrained(tmp_path / "config.json")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(61, 16, padding_idx=0)
        self.out = nn.Linear(16, 61)
        self.out.weight = self.table.weight

    def forward(self, ids):
        return self.out(self.table(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_a_compressed_model_comes_back(tied, tmp_path):
    def make():
        model = Model()
        if not tied:
            model.out = nn.Linear(16, 61)
        return model

    model = make()
    report = cprec_kernels.compress(model, torch.rand(61), partition=PARTITION)
    report.plan.save_pretrained(model, tmp_path)
    fresh = make()
    assert CompressionPlan.load_pretrained(fresh, tmp_path) == report.plan
    assert torch.equal(fresh(IDS), model(IDS))
    if tied:
        assert fresh.table.embedding.embeddings[0] is fresh.out.softmax.embedding.embeddings[0]
    with pytest.raises(ValueError, match="holds a CompressionPlan"):
        TiedBlocks.from_pretrained(tmp_path)


def test_a_full_disk_is_named_with_the_file(tmp_path, small_disk):
    module = ClusteredSoftmaxWithLoss(16, Partition.single(1_000, 16))
    with pytest.raises(OSError, match=r"File too large: '.*new/model\.safetensors'"):
        module.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_module_does_not_change_with_the_file_it_came_from(tmp_path):
    partition = Partition(1_000, [100], [16, 4], 16)
    first, second = (ClusteredSoftmaxWithLoss(16, partition) for _ in range(2))
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    loaded = ClusteredSoftmaxWithLoss.from_pretrained(tmp_path / "first")
    shutil.copyfile(tmp_path / "second" / "model.safetensors", tmp_path / "first" / "model.safetensors")
    hidden = torch.randn(3, 16)
    assert torch.equal(loaded.log_prob(hidden), first.log_prob(hidden))
