import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from cprec import checkpoint
from cprec.checkpoint import CheckpointError, load, read_config, read_tensors, save
from cprec.model import NextItNet, NextItNetConfig


def make(seed=0, **options):
    torch.manual_seed(seed)
    options = {"dilations": [1, 2], "head_bias": True, "tail_bias": True, **options}
    return NextItNet(NextItNetConfig.from_plan(60, 8, [7, 20], [8, 4, 2], **options))


@pytest.fixture(params=["package", "torch alone"])
def reader(request, monkeypatch):
    """Both ways to read: with the safetensors package and without it."""
    if request.param == "torch alone":
        monkeypatch.setitem(sys.modules, "safetensors", None)
    return request.param


@pytest.fixture
def saved(tmp_path):
    """A folder saved by the package, made before ``reader`` may hide it."""
    return save(tmp_path / "model", make(), extra={"training": {"epochs": 3}})


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def test_missing_folder_and_files(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; give the folder"):
        load(tmp_path / "elsewhere")
    (saved / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights.safetensors: no such file"):
        load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load(saved)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ('{"format": "cprec-nextit', "is not JSON .* truncated"),
        ("[1, 2]", "is not the configuration of a checkpoint"),
        ('{"format": "other"}', "is not the configuration of a checkpoint"),
        ('{"format": "cprec-nextitnet", "format_version": 99}', "format_version 99, but this cprec reads 1"),
        ('{"format": "cprec-nextitnet", "format_version": 1}', 'lacks the section "model"'),
        ('{"format": "cprec-nextitnet", "format_version": 1, "model": 3}', "must be a mapping"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_config(saved, text, words):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load(saved)


def test_bad_value_in_config_is_named_with_its_file(saved):
    model = json.loads((saved / "config.json").read_text())["model"]
    rewrite_config(saved, model={**model, "kernel_size": 0})
    with pytest.raises(CheckpointError, match=r"config.json: kernel_size must be at least 1, got 0"):
        load(saved)


def test_config_of_other_weights(saved):
    model = json.loads((saved / "config.json").read_text())["model"]
    rewrite_config(saved, model={**model, "dilations": [4, 8]})  # every tensor would fit
    with pytest.raises(CheckpointError, match="saved with another model configuration"):
        load(saved)


def test_tensors_that_do_not_fit_are_named(saved, reader):
    tensors, _ = read_tensors(saved / "weights.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    del tensors["softmax.head_bias"]
    tensors["user.weight"] = torch.zeros(2)
    tensors["backbone.sets.0.weight"] = torch.zeros(8, 8, 5)
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_safetensors(saved / "weights.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    for words in (
        "softmax.head_bias is missing",
        "user.weight is not part of the model",
        "backbone.sets.0.weight has shape (8, 8, 5) instead of (8, 8, 3)",
        "weights.safetensors does not fit",
    ):
        assert words in str(caught.value)


def test_integer_weights_are_refused(saved, reader):
    tensors, _ = read_tensors(saved / "weights.safetensors")
    header, data = {}, b""
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "I8",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + tensor.numel()],
        }
        data += bytes(tensor.numel())
    write_safetensors(saved / "weights.safetensors", header, data)
    with pytest.raises(CheckpointError, match=r"one floating-point dtype, they have torch.int8"):
        load(saved)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_weights(saved, reader, keep):
    path = saved / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load(saved)


def test_longer_file_and_foreign_file(saved, reader):
    path = saved / "weights.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load(saved)
    torch.save(make().state_dict(), path)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        load(saved)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_run(saved, reader, tmp_path):
    for name in ("weights.safetensors", "config.json"):
        (saved / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
        with pytest.raises(CheckpointError):
            load(saved)
    with pytest.raises(CheckpointError):
        read_tensors(saved / "weights.safetensors")
    assert not (tmp_path / "ran").exists()


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **others):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **others}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="empty header"),
        pytest.param(b"\xff\xfe{}", id="not UTF-8"),
        pytest.param(b'{"a": ', id="cut JSON"),
        pytest.param([1], id="not an object"),
        pytest.param({"a": 5}, id="entry is not an object"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, id="no offsets"),
        pytest.param({"a": entry(dtype="F31")}, id="unknown dtype"),
        pytest.param({"a": entry(shape=(3,))}, id="shape larger than the span"),
        pytest.param({"a": entry(shape=(1,))}, id="shape smaller than the span"),
        pytest.param({"a": entry(shape=(-2,))}, id="negative shape"),
        pytest.param({"a": entry(shape=(2.0,))}, id="fractional shape"),
        pytest.param({"a": entry(shape=(2**63, 2))}, id="overflowing shape"),
        pytest.param({"a": entry(offsets=(8, 0))}, id="end before begin"),
        pytest.param({"a": entry(offsets=(-8, 0))}, id="negative offset"),
        pytest.param({"a": entry(offsets=(0, 8, 9))}, id="three offsets"),
        pytest.param({"a": entry(shape=(4,), offsets=(0, 16))}, id="past the end"),
        pytest.param({"a": entry(shape=(1,), offsets=(4, 8))}, id="hole at the start"),
        pytest.param({"a": entry(shape=(1,), offsets=(0, 4))}, id="bytes left over"),
        pytest.param({"a": entry(), "b": entry()}, id="overlap"),
        pytest.param({"a": entry(), "__metadata__": {"x": 1}}, id="metadata not strings"),
    ],
)
def test_lying_headers(tmp_path, reader, header):
    path = write_safetensors(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"bad.safetensors is not a whole safetensors file"):
        read_tensors(path)


def test_header_length_beyond_the_file(tmp_path, reader):
    path = tmp_path / "bad.safetensors"
    for length in (3, 2**40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            read_tensors(path)


def test_names_that_occur_twice_are_refused_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    one = json.dumps(entry())
    path = write_safetensors(tmp_path / "bad.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), bytes(8))
    with pytest.raises(CheckpointError, match="a name occurs twice"):
        read_tensors(path)


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


def flip_in_data(path, tensor, value=None):
    """Change one byte of a tensor in the file, or make its first number ``value``."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0] + 8 + length
    if value is None:
        data[begin] ^= 1
    else:
        data[begin : begin + 4] = struct.pack("<f", value)
    path.write_bytes(data)


def test_a_bit_that_flipped_is_noticed(saved, reader):
    flip_in_data(saved / "weights.safetensors", "softmax.weights.1")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged .*another checksum"):
        load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(saved, reader, value):
    """Also in files from before there was a checksum, which are read as ever."""
    older = {checkpoint.FINGERPRINT_KEY: read_tensors(saved / "weights.safetensors")[1][checkpoint.SUMS_KEY][:64]}
    tensors = make().state_dict()
    save_file(tensors, saved / "weights.safetensors", metadata=older)
    assert load(saved).config == make().config
    flip_in_data(saved / "weights.safetensors", "softmax.weights.1", value)
    with pytest.raises(CheckpointError, match=r"damaged \(softmax\.weights\.1: not finite\)"):
        load(saved)


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    model = make()
    with torch.no_grad():
        model.softmax.weights[1][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"softmax\.weights\.1 of the model: not finite"):
        save(tmp_path / "model", model)
    assert names(tmp_path) == []


def test_a_full_disk_is_named_with_the_file(saved, small_disk):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert len(before["weights.safetensors"]) > 4096
    with pytest.raises(OSError, match=r"model/weights\.safetensors: cannot be written whole \(Error.*File too large"):
        save(saved, make(seed=1))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
