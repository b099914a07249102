"""Models on disk: a folder with ``config.json`` and ``weights.safetensors``. Nothing is ever unpickled.

Writing needs the safetensors package; reading needs torch alone and uses the package when it is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cprec.files import naming
from cprec.model import NextItNet, NextItNetConfig

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "weights.safetensors"
FORMAT = "cprec-nextitnet"
FORMAT_VERSION = 1
# In the file's metadata: SHA-256 of the model section of config.json, and CRC-32 of the tensors. One entry: the package
# writes several in any order, and a model is the same bytes whenever it is saved.
SUMS_KEY = "cprec_sums"
FINGERPRINT_KEY = "cprec_config_sha256"  # of files from before there was a checksum
RESERVED = frozenset({"format", "format_version", "model"})

# Names of the safetensors format (https://github.com/huggingface/safetensors, "Format").
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package


class CheckpointError(ValueError):
    """A folder or file that is not a whole, readable checkpoint; the message says which, why and what to do."""


def save(
    folder: str | os.PathLike[str], model: NextItNet, *, extra: Mapping[str, Mapping[str, Any]] | None = None
) -> Path:
    """Write ``model`` as a checkpoint folder.

    A new folder appears whole or not at all. In a folder that exists, the two files are replaced one after the other,
    each atomically, and other files stay. If the process dies in between, :func:`load` refuses weights and config.json
    of different models.

    Args:
        folder: made, with its parents, when missing.
        model: a NextItNet, compiled or not, on any device.
        extra: further sections of config.json, e.g. ``{"training": {...}}``; plain JSON values.

    Returns:
        The folder.

    Raises:
        CheckpointError: ``folder`` is a file, or holds a config.json that is not a checkpoint's.
        ImportError: the safetensors package is missing.
        OSError: a file cannot be written.
        TypeError, ValueError: not a NextItNet; parameters that are not finite; a section of ``extra`` is reserved or is
            not JSON.
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, NextItNet):
        raise TypeError(f"only a cprec.model.NextItNet can be saved, got {type(model).__name__}")
    text, fingerprint = _config_text(model.config, extra or {})
    if folder.exists():
        _check_ours(folder)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError("saving a model needs the safetensors package: pip install safetensors") from None

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if ruined := _not_finite(tensors):
        raise ValueError(f"{', '.join(ruined)} of the model: not finite, and so not worth saving")
    metadata = {SUMS_KEY: f"{fingerprint} {_checksum(tensors)}"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    exists = folder.exists()
    place = folder if exists else folder.parent
    with naming(folder), naming(folder / WEIGHTS_NAME), _staging(place, folder.name) as stage:
        try:
            save_file(tensors, stage / WEIGHTS_NAME, metadata=metadata)
        except SafetensorError as error:  # a full disk is one, too
            raise OSError(str(error)) from error
        (stage / CONFIG_NAME).write_text(text, encoding="utf-8")
        shutil.copymode(stage / CONFIG_NAME, stage / WEIGHTS_NAME)  # safetensors makes private files
        _sync([stage / WEIGHTS_NAME, stage / CONFIG_NAME, stage])
        if exists:
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (stage / name).replace(folder / name)
        else:
            stage.rename(folder)
        _sync([folder, folder.parent])
    return folder


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> NextItNet:
    """The model of a checkpoint folder, in evaluation mode, in the dtype it was saved in.

    Args:
        device: where the parameters go; the CPU by default.

    Raises:
        CheckpointError: the folder or a file is missing, truncated, foreign, of another format version; its tensors
            are not those that the configuration asks for (each is named), not finite, or not those that were saved.
    """
    folder = Path(folder)
    values = _read_config_json(folder)
    config = _model_config(folder, values)
    path = folder / WEIGHTS_NAME
    tensors, metadata = read_tensors(path)
    fingerprint, _, checksum = metadata.get(SUMS_KEY, metadata.get(FINGERPRINT_KEY, "")).partition(" ")
    if fingerprint and fingerprint != _fingerprint(values["model"]):
        raise CheckpointError(
            f"{path} was saved with another model configuration than {folder / CONFIG_NAME}: restore the config.json "
            "that was written with these weights, or save the model again"
        )
    # On the meta device no time is lost on random initial values; every parameter is then replaced.
    with torch.device("meta"):
        model = NextItNet(config)
    _check_tensors(path, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tensors)
    if checksum and checksum != _checksum(tensors):
        raise _damaged(path, "its tensors have another checksum than when they were saved")
    if ruined := _not_finite(tensors):
        raise _damaged(path, f"{', '.join(ruined)}: not finite")
    target = torch.device("cpu" if device is None else device)
    model.load_state_dict({name: tensor.to(target, copy=True) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def read_config(folder: str | os.PathLike[str]) -> tuple[NextItNetConfig, dict[str, Any]]:
    """The model configuration of a checkpoint folder, and the ``extra`` sections saved with it.

    Raises:
        CheckpointError: as :func:`load`, for config.json alone.
    """
    folder = Path(folder)
    values = _read_config_json(folder)
    return _model_config(folder, values), {name: value for name, value in values.items() if name not in RESERVED}


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; the tensors may be memory-mapped.

    Raises:
        CheckpointError: the file is missing, truncated or not in the safetensors format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the folder that a checkpoint was saved to")
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        return _read_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, str(error)) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """:func:`read_tensors` without the package: 8 bytes of header length, a JSON header, the bytes of the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"{size} bytes cannot hold a header of {length}")
        try:
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"unreadable header: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "the metadata are not strings")

    spans = sorted((*_span(path, name, entry), name) for name, entry in header.items())
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise _broken(path, f"tensor {name!r} begins at byte {begin} where {position} was expected")
        position = end
    if position != size - 8 - length:
        raise _broken(path, f"the tensors need {position} bytes, the file holds {size - 8 - length}")

    tensors: dict[str, Tensor] = {}
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    for begin, end, name in spans:
        dtype = DTYPES[header[name]["dtype"]]
        raw = data[begin:end]
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(header[name]["shape"])
    return tensors, metadata


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """First and last byte of a tensor in the data, checked against its dtype and shape."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} has the shape {shape!r} and the offsets {offsets!r}")
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != need:
        raise _broken(path, f"tensor {name!r} of shape {shape} needs {need} bytes, its offsets are {offsets}")
    return offsets[0], offsets[1]


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file ({why}): it was truncated, changed, or is another format. {_AGAIN}"
    )


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged ({why}). {_AGAIN}")


_AGAIN = "Copy it again from where it was saved, or save the model again"


def _config_text(config: NextItNetConfig, extra: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Contents of config.json, and the fingerprint of its model section."""
    if reserved := sorted(RESERVED & set(extra)):
        raise ValueError(f"the section names {', '.join(reserved)} of config.json are reserved: choose others")
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": config.to_dict(), **extra}
    try:
        text = json.dumps(values, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"config.json can only hold plain JSON values: {error}") from error
    return text + "\n", _fingerprint(values["model"])


def _fingerprint(model_section: Any) -> str:
    return hashlib.sha256(json.dumps(model_section, sort_keys=True).encode()).hexdigest()


def _read_config_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that a checkpoint was saved to")
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}: it is not a checkpoint folder")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}): it was truncated or changed; save the model again"
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not the configuration of a checkpoint ("format" is not "{FORMAT}")')
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {values.get('format_version')!r}, but this cprec reads {FORMAT_VERSION}: "
            "read it with the version that wrote it"
        )
    if "model" not in values:
        raise CheckpointError(f'{path} lacks the section "model": it was changed; save the model again')
    return values


def _model_config(folder: Path, values: dict[str, Any]) -> NextItNetConfig:
    try:
        return NextItNetConfig.from_dict(values["model"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error


def _check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError that names every missing, extra, mis-shaped or mistyped tensor."""
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is not part of the model" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            faults.append(f"{name} has shape {tuple(tensors[name].shape)} instead of {shape}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        faults.append(
            f"the tensors must share one floating-point dtype, they have {', '.join(sorted(map(str, dtypes)))}"
        )
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError(
            f"{path} does not fit the model in {CONFIG_NAME}: {shown}. Restore the two files of one save, or save again"
        )


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the tensors' names and bytes, in the order of the names."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(name.encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold NaN or an infinity, which both are a minimum or a maximum then."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all()
    ]


def _check_ours(folder: Path) -> None:
    """Refuse to write into something that is not a folder, or over a config.json of another program."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: choose a folder to save to")
    if (folder / CONFIG_NAME).exists():
        try:
            _read_config_json(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. It is left as it is: choose another folder to save to") from error


@contextlib.contextmanager
def _staging(parent: Path, name: str) -> Iterator[Path]:
    """A temporary folder in ``parent``, removed with what is left in it."""
    stage = parent / f".{name}.{uuid.uuid4().hex}.tmp"
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(paths: Iterable[Path]) -> None:
    """Ask the system to put files and folders on disk, where it can."""
    for path in paths:
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
