"""Folders and files that are not whole, sound checkpoints are named, with what is wrong; nothing of them is run."""

import json
import pickle
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file

from cprec import checkpoint
from cprec.checkpoint import CheckpointError, load, read_tensors, save
from tests.cprec.checkpoints import entry, make, names, rewrite_config, write_safetensors


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
