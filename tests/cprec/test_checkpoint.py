import json
import os
import struct
import subprocess
import sys

import pytest
import torch

from cprec import checkpoint
from cprec.checkpoint import CheckpointError, load, read_config, read_tensors, save
from tests.cprec.checkpoints import entry, make, names, write_safetensors


@pytest.mark.parametrize("sharing", ["none", "cross-layer", "cross-block", "adjacent-layer", "adjacent-block"])
@pytest.mark.parametrize("block", ["residual", "bottleneck"])
def test_round_trip(tmp_path, block, sharing):
    if (block, sharing) == ("bottleneck", "adjacent-layer"):
        sharing = "adjacent-block"
    model = make(block=block, sharing=sharing, dropout=0.5).train()
    loaded = load(save(tmp_path / "model", model))
    assert loaded.config == model.config
    assert not loaded.training
    assert model.training
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    items = torch.randint(60, (3, 5))
    assert torch.equal(loaded(items), model.eval()(items))
    loaded.train().loss(items).backward()


def test_round_trip_of_tied_tails(tmp_path):
    model = make(tie_tails=True)
    loaded = load(save(tmp_path / "model", model))
    tensors, _ = read_tensors(tmp_path / "model" / "weights.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == model.config.num_parameters
    assert loaded.embedding is loaded.softmax.embedding
    items = torch.randint(60, (3, 5))
    assert torch.equal(loaded(items), model.eval()(items))
    assert torch.equal(loaded.topk(items, 5)[0], model.topk(items, 5)[0])


def test_what_was_saved_reads_the_same_both_ways(saved, reader):
    tensors, metadata = read_tensors(saved / "weights.safetensors")
    assert list(metadata) == [checkpoint.SUMS_KEY]
    expected = make().state_dict()
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    loaded = load(saved)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(tmp_path, dtype, monkeypatch):
    model = make().to(dtype)
    folder = save(tmp_path / "model", model)
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "safetensors", None)
        alone = load(folder)
    for loaded in (load(folder), alone):
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_loaded_weights_do_not_depend_on_the_file(saved, reader):
    loaded = load(saved)
    with (saved / "weights.safetensors").open("r+b") as file:
        file.write(b"\xff" * (saved / "weights.safetensors").stat().st_size)
    expected = make().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_reading_needs_torch_alone(saved):
    code = """
import sys
for name in ("safetensors", "lightning", "pytorch_lightning", "polars", "rich", "typer", "matplotlib"):
    sys.modules[name] = None
from cprec import checkpoint
model = checkpoint.load(sys.argv[1])
print(sum(parameter.numel() for parameter in model.parameters()))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == make().config.num_parameters


def test_saving_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save(tmp_path / "new" / "model", make())
    assert list(tmp_path.iterdir()) == []


def test_extra_sections(saved):
    config, extra = read_config(saved)
    assert config == make().config
    assert extra == {"training": {"epochs": 3}}


def test_bad_extra_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"section names format, model of config.json are reserved"):
        save(tmp_path / "model", make(), extra={"model": {}, "format": {}})
    with pytest.raises(TypeError, match=r"config.json can only hold plain JSON values"):
        save(tmp_path / "model", make(), extra={"training": {"device": torch.device("cpu")}})
    with pytest.raises(ValueError, match=r"config.json can only hold plain JSON values"):
        save(tmp_path / "model", make(), extra={"metrics": {"loss": float("nan")}})
    with pytest.raises(TypeError, match="got Linear"):
        save(tmp_path / "model", torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_folder_holds_two_public_files_and_nothing_else(saved):
    assert names(saved) == ["config.json", "weights.safetensors"]
    assert names(saved.parent) == ["model"]
    assert (saved / "weights.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_saving_is_reproducible(saved, tmp_path):
    again = save(tmp_path / "again", make(), extra={"training": {"epochs": 3}})
    for name in ("config.json", "weights.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_saving_again_replaces_the_model_and_leaves_other_files(saved):
    (saved / "metrics.json").write_text("{}")
    save(saved, make(seed=1, sharing="cross-layer"))
    assert names(saved) == ["config.json", "metrics.json", "weights.safetensors"]
    loaded = load(saved)
    assert loaded.config.sharing == "cross-layer"
    expected = make(seed=1, sharing="cross-layer").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_changes_nothing(tmp_path, monkeypatch, existing):
    folder = tmp_path / "model"
    before = {}
    if existing:
        save(folder, make())
        before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(folder, make(seed=1))
    assert names(tmp_path) == (["model"] if existing else [])
    if existing:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_never_overwrites_what_is_not_a_checkpoint(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "config.json").write_text('{"name": "something else"}')
    with pytest.raises(CheckpointError, match="left as it is: choose another folder"):
        save(folder, make())
    assert (folder / "config.json").read_text() == '{"name": "something else"}'
    assert names(folder) == ["config.json"]
    with pytest.raises(CheckpointError, match="is a file: choose a folder"):
        save(folder / "config.json", make())


def test_compiled_model_is_saved_as_it_is(tmp_path):
    model = make()
    folder = save(tmp_path / "model", torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert list(load(folder).state_dict()) == list(model.state_dict())


def test_device(saved):
    assert {parameter.device.type for parameter in load(saved, "meta").parameters()} == {"meta"}
    assert {parameter.device.type for parameter in load(saved, torch.device("cpu")).parameters()} == {"cpu"}


def test_every_dtype_and_odd_alignment(tmp_path, reader):
    """A header of odd length and mixed widths leave tensors at addresses that are no multiple of their item size."""
    torch.manual_seed(0)
    header, data, expected = {}, b"", {}
    for name, dtype in [("U8", torch.uint8), *checkpoint.DTYPES.items()]:
        key = f"t{len(header)}"
        tensor = torch.randint(0, 2, (3, 1)).to(dtype)
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        header[key] = entry(name, (3, 1), (len(data), len(data) + len(raw)))
        expected[key] = tensor
        data += raw
    header["empty"] = entry("F32", (0, 4), (len(data), len(data)))
    header["scalar"] = entry("F32", (), (len(data), len(data) + 4))
    data += struct.pack("<f", 1.5)
    text = json.dumps(header).encode()
    path = write_safetensors(tmp_path / "mixed.safetensors", text + b" " * (len(text) % 2 == 0), data)
    tensors, metadata = read_tensors(path)
    assert metadata == {}
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor), key
    assert tensors["empty"].shape == (0, 4)
    assert tensors["scalar"].item() == 1.5
