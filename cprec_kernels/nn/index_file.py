"""The file of a packed index: a prefix, a JSON header, and the arrays, ready to be mapped.

::

    8 bytes   magic
    4 bytes   format version        little-endian, as all numbers
    4 bytes   length of the header
    4 bytes   CRC-32 of the 8 bytes before it and of the header
    header    JSON: partition, storage, exact, blocks, parameters (checksum of what the index was built from), arrays
    arrays    each at a multiple of 4096 bytes, in the header's order: [name, dtype, shape, offset, CRC-32]

Arrays without elements are left out. Nothing on disk is trusted: every number is checked before it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import struct
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.topk_index import LISTS, IndexArrays, check_arrays
from ..partition import Partition
from .index_packing import BLOCKS, STORAGES
from .whole_file import whole_file

MAGIC = b"CPRECTKI"
FORMAT_VERSION = 2
PREFIX = struct.Struct("<8sIII")
ALIGNMENT = 4096
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGES.values(), torch.int32, torch.float64)}
KEYS = {"partition", "storage", "exact", "blocks", "parameters", "arrays"}
# Bytes that are checked, or written, at a time.
_CHUNK = 1 << 24


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def bytes_of(array: Tensor) -> memoryview:
    """The bytes of a contiguous array, as they are in memory.

    Not by ``Tensor.numpy``, after which a storage cannot be resized any more: FSDP resizes those of parameters.
    """
    flat = array.reshape(-1).view(torch.uint8)
    if not flat.numel():
        return memoryview(b"")
    buffer: Any = (ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())
    buffer.keeps = flat  # or the storage may be gone before the bytes are read
    return memoryview(buffer).cast("B")


def _crc(data: memoryview) -> int:
    value = 0
    for start in range(0, len(data), _CHUNK):
        value = zlib.crc32(data[start : start + _CHUNK], value)
    return value


# Writing


def write_index(path: str | os.PathLike[str], about: Mapping[str, Any], arrays: IndexArrays) -> None:
    """Write an index: ``about`` holds all KEYS of the header but the arrays. The file appears whole or not at all.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    if sys.byteorder != "little":
        raise OSError("index files are little-endian, and so are the machines that can write them")
    path = Path(path)
    kept = [(name, array) for name, array in arrays.named() if array.numel() > 0]
    prefix, header, offsets = _layout(about, kept)
    with whole_file(path) as file:
        file.write(prefix + header)
        for (_, array), offset in zip(kept, offsets, strict=True):
            file.write(bytes(offset - file.tell()))
            file.write(bytes_of(array))
    # The rename itself, where the system lets a folder be synced.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _layout(about: Mapping[str, Any], kept: list[tuple[str, Tensor]]) -> tuple[bytes, bytes, list[int]]:
    """Prefix, header and the arrays' offsets. The header's length depends on the offsets, and they on it."""
    entries: list[list[Any]] = [
        [name, str(array.dtype).removeprefix("torch."), list(array.shape), 0, _crc(bytes_of(array))]
        for name, array in kept
    ]
    header = b""
    start = ALIGNMENT
    while True:
        offset = start
        for entry, (_, array) in zip(entries, kept, strict=True):
            entry[3] = offset
            offset = _aligned(offset + array.nbytes)
        header = json.dumps({**about, "arrays": entries}, allow_nan=False).encode()
        needed = _aligned(PREFIX.size + len(header))
        if needed <= start:
            break
        start = needed
    counted = struct.pack("<II", FORMAT_VERSION, len(header))
    prefix = PREFIX.pack(MAGIC, FORMAT_VERSION, len(header), zlib.crc32(header, zlib.crc32(counted)))
    return prefix, header, [entry[3] for entry in entries]


# Reading


class BrokenFileError(Exception):
    """What is wrong with a file; the caller knows its name."""


def read_index(
    path: str | os.PathLike[str], *, mmap: bool, verify: bool
) -> tuple[dict[str, Any], Partition, IndexArrays]:
    """The header, the partition and the arrays of a file; arguments as :meth:`TopKIndex.load`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an index, or not a whole and sound one; the message names the file and what was wrong.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        about = _read_header(path, size)
        partition = _check_about(about)
        spans = _check_entries(about["arrays"], size)
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        if not mmap:
            data = data.clone()
        named = {}
        for name, (dtype, shape, begin, end, crc) in spans.items():
            raw = data[begin:end]
            if verify and _crc(bytes_of(raw)) != crc:
                raise BrokenFileError(f"the bytes of {name} do not have their checksum")
            named[name] = raw.view(dtype).view(shape)
        arrays = _assemble(partition, named)
        _check_shapes(about, partition, arrays)
        if verify:
            _check_ids(partition, arrays)
    except BrokenFileError as error:
        raise ValueError(
            f"{path} is not a sound TopKIndex file: {error}. Copy it again from where it was saved, or build the index "
            "again and save it"
        ) from error.__cause__
    return about, partition, arrays


def _read_header(path: Path, size: int) -> dict[str, Any]:
    with path.open("rb") as file:
        prefix = file.read(PREFIX.size)
        if prefix[: len(MAGIC)] != MAGIC:
            raise BrokenFileError("it does not begin as one; it was written by something else, or is empty")
        if len(prefix) < PREFIX.size:
            raise BrokenFileError(f"it is truncated, to {size} bytes")
        _, version, length, crc = PREFIX.unpack(prefix)
        if version != FORMAT_VERSION:
            raise BrokenFileError(
                f"it has format version {version} and this cprec_kernels reads {FORMAT_VERSION}; "
                "read it with the version that wrote it"
            )
        if length > size - PREFIX.size:
            raise BrokenFileError(f"it is truncated: {size} bytes cannot hold a header of {length}")
        header = file.read(length)
    if len(header) != length or zlib.crc32(header, zlib.crc32(prefix[8:16])) != crc:
        raise BrokenFileError("its header does not have its checksum")
    try:
        about = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"its header is not JSON ({error})") from error
    if not isinstance(about, dict) or set(about) != KEYS:
        raise BrokenFileError(f"its header does not hold {', '.join(sorted(KEYS))}")
    return about


def _check_about(about: Mapping[str, Any]) -> Partition:
    """The header's partition. Raises BrokenFileError unless all but the arrays make sense."""
    storage, exact, blocks = about["storage"], about["exact"], about["blocks"]
    if not isinstance(storage, str) or storage not in STORAGES:
        raise BrokenFileError(f"its storage {storage!r} is unknown")
    if not isinstance(exact, bool) or (storage == "float32" and not exact):
        raise BrokenFileError(f"exact = {exact!r} does not go with storage {storage}")
    if blocks is not None and (not isinstance(blocks, str) or blocks not in BLOCKS):
        raise BrokenFileError(f"its blocks {blocks!r} are unknown")
    if not isinstance(about["parameters"], str):
        raise BrokenFileError("the checksum of its parameters is not text")
    try:
        return Partition.from_dict(about["partition"])
    except (TypeError, ValueError) as error:
        raise BrokenFileError(f"its partition is none: {error}") from error


def _check_entries(entries: Any, size: int) -> dict[str, tuple[torch.dtype, list[int], int, int, int]]:
    """Name -> dtype, shape, first and last byte, checksum. Raises BrokenFileError unless they fill the file in order."""
    if not isinstance(entries, list):
        raise BrokenFileError("its arrays are not a list")
    spans: dict[str, tuple[torch.dtype, list[int], int, int, int]] = {}
    position = 0
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 5:
            raise BrokenFileError(f"an array is described by {entry!r}")
        name, dtype, shape, offset, crc = entry
        if not isinstance(name, str) or name in spans:
            raise BrokenFileError(f"the name {name!r} is no name, or occurs twice")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise BrokenFileError(f"{name} has the unknown dtype {dtype!r}")
        if not isinstance(shape, list) or not all(type(length) is int and length > 0 for length in shape):
            raise BrokenFileError(f"{name} has the shape {shape!r}")
        if type(offset) is not int or type(crc) is not int:
            raise BrokenFileError(f"{name} has the offset {offset!r} and the checksum {crc!r}")
        if offset % ALIGNMENT or offset < max(position, ALIGNMENT):
            raise BrokenFileError(
                f"{name} begins at byte {offset}, behind {position} and a multiple of {ALIGNMENT} expected"
            )
        position = offset + math.prod(shape) * DTYPES[dtype].itemsize
        spans[name] = DTYPES[dtype], shape, offset, position, crc
    if position != size:
        raise BrokenFileError(
            f"it holds {size} bytes, its arrays end at {position}: it was truncated, or something was added"
        )
    return spans


def _assemble(partition: Partition, named: dict[str, Tensor]) -> IndexArrays:
    """The arrays by their names; those that are not there are absent."""
    arrays = IndexArrays.absent(partition.sizes, partition.ranks[0])
    lists: dict[str, Any] = arrays._asdict()
    for name, array in named.items():
        field, dot, place = name.partition(".")
        level = int(place) if dot and place.isascii() and place.isdigit() and len(place) < 4 else -1
        if not dot and field in ("bounds", "parents", "parent_bias"):
            lists[field] = array
        elif field in IndexArrays._fields[LISTS] and 0 <= level < partition.num_clusters:
            lists[field][level] = array
        else:
            raise BrokenFileError(f"it holds {name}, which is not part of an index of {partition.num_clusters} levels")
    return IndexArrays(**lists)


def _check_shapes(about: Mapping[str, Any], partition: Partition, arrays: IndexArrays) -> None:
    """Raise BrokenFileError unless the arrays fit each other, the partition and the header."""
    try:
        check_arrays(arrays)
    except (TypeError, ValueError) as error:
        what = str(error).removesuffix("; build the index again")
        raise BrokenFileError(f"its arrays do not fit together: {what}") from error
    ranks = tuple(int(group.shape[1]) for group in arrays.groups)
    if ranks != partition.ranks or arrays.width != partition.embedding_dim:
        raise BrokenFileError(f"its arrays are of ranks {ranks} and width {arrays.width}, its partition is not")
    if arrays.groups[0].dtype != STORAGES[about["storage"]]:
        raise BrokenFileError(f"its items are {arrays.groups[0].dtype}, its storage is {about['storage']}")
    if (arrays.exact[0].numel() > 0) != (about["exact"] and about["storage"] != "float32"):
        raise BrokenFileError(f"exact is {about['exact']}, and its fp32 items do not agree")
    with_leaves = [j for j, leaves in enumerate(arrays.leaves) if leaves.numel() > 0]
    tails = list(range(1, len(ranks)))
    blocks = about["blocks"]
    if with_leaves != ([] if blocks is None else tails) and not (blocks == "auto" and set(with_leaves) <= set(tails)):
        raise BrokenFileError(f"blocks are {blocks}, and the levels {with_leaves} have leaves")


def _check_ids(partition: Partition, arrays: IndexArrays) -> None:
    """Raise BrokenFileError unless every reordered level names each of its items once."""
    offsets = partition.offsets
    for j, ids in enumerate(arrays.ids):
        if ids.numel() == 0:
            continue
        size = partition.sizes[j]
        wanted = torch.arange(offsets[j], offsets[j + 1], dtype=torch.int32, device="cpu")
        if not torch.equal(ids[:size].sort().values, wanted) or not bool((ids[size:] == -1).all()):
            raise BrokenFileError(f"ids.{j} do not name every item of {offsets[j]}..{offsets[j + 1] - 1} once")
