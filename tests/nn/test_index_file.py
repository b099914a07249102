"""TopKIndex.save and load: files come back as they were, and what is not such a file is told, never searched."""

from __future__ import annotations

import json
import os
import random
import struct
import threading
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from cprec_kernels import Partition
from cprec_kernels.nn import ClusteredSoftmaxWithLoss, TopKIndex
from cprec_kernels.nn.index_file import ALIGNMENT, FORMAT_VERSION, MAGIC, PREFIX
from cprec_kernels.nn.index_packing import STORAGES
from cprec_kernels.testing import make_hidden

PARTITION = Partition(1_517, [101, 300], [24, 9, 4], 24)


def softmax(partition=PARTITION, bias=True):
    module = ClusteredSoftmaxWithLoss(partition.embedding_dim, partition, bias, bias)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture
def module():
    return softmax()


@pytest.fixture
def path(module, tmp_path):
    """A file of an index that has every kind of array."""
    path = tmp_path / "catalogue.index"
    module.build_index("int8", blocks="kd").save(path)
    return path


def header_of(path):
    return header_of_bytes(path.read_bytes())


def header_of_bytes(data):
    _, _, length, _ = PREFIX.unpack(data[: PREFIX.size])
    return json.loads(data[PREFIX.size : PREFIX.size + length])


def write_header(path, header, version=FORMAT_VERSION):
    """Replace a file's header, with a checksum that is right. The arrays stay where they are."""
    data = bytearray(path.read_bytes())
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = min(entry[3] for entry in header_of(path)["arrays"])
    assert PREFIX.size + len(text) <= start
    crc = zlib.crc32(text, zlib.crc32(struct.pack("<II", version, len(text))))
    data[:start] = (PREFIX.pack(MAGIC, version, len(text), crc) + text).ljust(start, b"\0")
    path.write_bytes(data)


def assert_same_index(index, other):
    assert (index.storage, index.exact, index.blocks) == (other.storage, other.exact, other.blocks)
    assert index.partition == other.partition
    for (name, ours), (_, theirs) in zip(index._arrays.named(), other._arrays.named(), strict=True):
        assert ours.numel() == theirs.numel()
        if ours.numel() > 0:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), name


# Round trips


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
def test_files_come_back_as_they_were(case, storage, mmap, tmp_path):
    module = softmax(case.partition, bias=storage != "bfloat16")
    hidden = make_hidden(case.partition, (5,))
    for exact, blocks in ((True, "kd"), (True, None), (False, "kd"), (True, "auto")):
        index = TopKIndex.build(module, storage, exact=exact, blocks=blocks)
        index.save(tmp_path / "a.index")
        for verify in (True, False):
            loaded = TopKIndex.load(str(tmp_path / "a.index"), mmap=mmap, verify=verify)
            assert_same_index(loaded, index)
            assert (loaded.nbytes, loaded.nbytes_exact) == (index.nbytes, index.nbytes_exact)
            for ours, theirs in zip(loaded.topk(hidden, 9), index.topk(hidden, 9), strict=True):
                assert torch.equal(ours, theirs)
        loaded.save(tmp_path / "b.index")
        assert (tmp_path / "a.index").read_bytes() == (tmp_path / "b.index").read_bytes()


def test_arrays_are_aligned_for_mapping(path):
    entries = header_of(path)["arrays"]
    assert {entry[0].partition(".")[0] for entry in entries} == {
        "groups", "scales", "exact", "biases", "projections", "ids", "leaves", "leaf_stats", "leaf_bases", "bounds",
        "parents", "parent_bias",
    }  # fmt: skip
    assert all(entry[3] % ALIGNMENT == 0 for entry in entries)
    for mmap in (True, False):
        for _, array in TopKIndex.load(path, mmap=mmap)._arrays.named():
            assert array.data_ptr() % 64 == 0


def test_long_headers_move_the_arrays(tmp_path, monkeypatch):
    index = softmax().build_index("int8", blocks="kd")
    monkeypatch.setattr("cprec_kernels.nn.index_file.ALIGNMENT", 64)
    index.save(tmp_path / "a.index")
    data = (tmp_path / "a.index").read_bytes()
    first = header_of(tmp_path / "a.index")["arrays"][0][3]
    assert first - 64 < PREFIX.size + PREFIX.unpack(data[: PREFIX.size])[2] <= first
    assert first > 64
    assert_same_index(TopKIndex.load(tmp_path / "a.index"), index)


def test_a_search_does_not_write_to_the_file(path, module):
    before = path.read_bytes()
    index = TopKIndex.load(path)
    index.topk(make_hidden(PARTITION, (5,)), 20)
    index._arrays.groups[0].zero_()  # a private mapping: this process's own
    assert path.read_bytes() == before
    assert_same_index(TopKIndex.load(path), module.build_index("int8", blocks="kd"))


def test_a_file_may_be_replaced_while_it_is_mapped(path, module):
    hidden = make_hidden(PARTITION, (5,))
    index = TopKIndex.load(path)
    expected = index.topk(hidden, 9).items
    softmax().build_index("float32", blocks="kd").save(path)
    assert torch.equal(index.topk(hidden, 9).items, expected)
    assert TopKIndex.load(path).storage == "float32"
    path.unlink()
    assert torch.equal(index.topk(hidden, 9).items, expected)


def test_threads_share_a_mapped_index(path, module):
    hidden = make_hidden(PARTITION, (16,))
    index = TopKIndex.load(path, verify=False)
    expected = [index.topk(hidden[row : row + 4], 9) for row in range(12)]
    failures = []

    def search(offset):
        for turn in range(24):
            row = (turn + offset) % 12
            result = index.topk(hidden[row : row + 4], 9)
            if not all(torch.equal(a, b) for a, b in zip(result, expected[row], strict=True)):
                failures.append((offset, turn))

    threads = [threading.Thread(target=search, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert torch.equal(index.topk(hidden, 9).items, module.topk(hidden, 9)[1])


# The module of a file


def test_a_file_belongs_to_the_parameters_it_was_built_from(path, module):
    assert not TopKIndex.load(path).is_stale
    index = TopKIndex.load(path, module=module)
    assert not index.is_stale
    other = softmax()
    with pytest.raises(ValueError, match=r"catalogue.index was built from other parameters than the module's"):
        TopKIndex.load(path, module=other)
    other.load_state_dict(module.state_dict())
    TopKIndex.load(path, module=other)
    with pytest.raises(ValueError, match="built from other parameters"):
        TopKIndex.load(path, module=other.bfloat16())
    with torch.no_grad():
        module.tail_biases[1][-1] += 1e-3
    assert index.is_stale
    with pytest.raises(RuntimeError, match="build it again"):
        index.topk(torch.randn(1, 24), 3)
    with pytest.raises(ValueError, match="built from other parameters"):
        TopKIndex.load(path, module=module)
    assert TopKIndex.load(path).topk(torch.randn(1, 24), 3).items.shape == (1, 3)
    index.save(path)  # a stale index is saved as what it is
    with pytest.raises(ValueError, match="built from other parameters"):
        TopKIndex.load(path, module=module)
    with pytest.raises(ValueError, match=r"is an index of num_items=1517.* the module has num_items=90"):
        TopKIndex.load(path, module=softmax(Partition(90, [], [24], 24)))
    with pytest.raises(TypeError, match="of a ClusteredSoftmaxWithLoss, got Linear"):
        TopKIndex.load(path, module=nn.Linear(2, 2))


# Files that are not sound


def assert_told(path, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        TopKIndex.load(path, **options)
    assert str(path) in str(error.value)
    assert "Copy it again from where it was saved, or build the index again and save it" in str(error.value)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"x",
        MAGIC,
        b"PK\x03\x04" * 100,
        b"{}",
        bytes(5_000),
        random.Random(0).randbytes(9_000),
        MAGIC[::-1] + bytes(4_096),
    ],
    ids=["empty", "letter", "magic", "zip", "json", "zeros", "random", "reversed"],
)
def test_foreign_files_are_told(contents, tmp_path):
    path = tmp_path / "a.index"
    path.write_bytes(contents)
    for verify in (True, False):
        assert_told(path, "does not begin as one|truncated", verify=verify)


def test_paths_that_are_no_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.index"):
        TopKIndex.load(tmp_path / "nothing.index")
    with pytest.raises(OSError, match=str(tmp_path)):
        TopKIndex.load(tmp_path)


def test_every_truncation_is_found(path):
    """Also without verify: what a search would read behind the end of a file is a crash, not an error."""
    data = path.read_bytes()
    arrays = header_of(path)["arrays"]
    ends = {entry[3] for entry in arrays} | {entry[3] + 1 for entry in arrays}
    for size in sorted({*range(0, 64), 200, 1_000, 4_095, len(data) // 2, len(data) - 4_096, len(data) - 1, *ends}):
        path.write_bytes(data[:size])
        for verify in (True, False):
            assert_told(path, "truncated|does not begin as one", verify=verify)
    for extra in (b"\0", bytes(4_096)):
        path.write_bytes(data + extra)
        assert_told(path, "something was added", verify=False)


def test_every_flipped_byte_is_found(path):
    data = path.read_bytes()
    end = PREFIX.size + PREFIX.unpack(data[: PREFIX.size])[2]
    places = [*range(0, PREFIX.size), *range(PREFIX.size, end, 37), end - 1]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        for verify in (True, False):
            assert_told(path, "checksum|does not begin|format version|cannot hold", verify=verify)
    for name, _, _, offset, _ in header_of_bytes(data)["arrays"]:
        for place in (offset, offset + 7):
            changed = bytearray(data)
            changed[place] ^= 0x10
            path.write_bytes(changed)
            assert_told(path, f"the bytes of {name} do not have their checksum")
    changed = bytearray(data)
    changed[-1] ^= 0x80
    path.write_bytes(changed)
    assert_told(path, "do not have their checksum", mmap=False)


def edits():
    """What is wrong with a header whose checksum is right -> how it came about, and what is said."""

    def entry(name, place, value):
        def edit(header):
            next(e for e in header["arrays"] if e[0] == name)[place] = value

        return edit

    def without(name):
        return lambda header: header["arrays"].remove(next(e for e in header["arrays"] if e[0] == name))

    def key(name, value):
        return lambda header: header.update({name: value})

    def partition(**values):
        return lambda header: header["partition"].update(values)

    return {
        "another storage": (key("storage", "float16"), "arrays do not fit|items are torch.int8"),
        "an unknown storage": (key("storage", "int4"), "storage 'int4' is unknown"),
        "a storage that is a list": (key("storage", []), r"storage \[\] is unknown"),
        "no exactness": (key("exact", False), "exact is False"),
        "exact is a number": (key("exact", 1), "exact = 1"),
        "no blocks": (key("blocks", None), "blocks are None"),
        "unknown blocks": (key("blocks", "pq"), "blocks 'pq' are unknown"),
        "parameters are a number": (key("parameters", 5), "not text"),
        "a key more": (key("more", 5), "does not hold"),
        "no partition": (key("partition", None), "its partition is none"),
        "a partition of text": (key("partition", "all"), "its partition is none"),
        "another number of items": (partition(num_items=1_600), "do not fit together|end at"),
        "a huge catalogue": (partition(num_items=10**30), "do not fit together"),
        "other cutoffs": (partition(cutoffs=[50, 300]), "do not fit together"),
        "a cutoff beside its place": (partition(cutoffs=[101, 299]), "ids.2 do not name every item of 299..1516"),
        "cutoffs out of order": (partition(cutoffs=[300, 101]), "cutoffs must be ascending"),
        "one cluster more": (partition(cutoffs=[101, 300, 1_516], ranks=[24, 9, 4, 4]), "do not fit together"),
        "one cluster fewer": (partition(cutoffs=[101], ranks=[24, 9]), "not part of an index of 2 levels"),
        "other ranks": (partition(ranks=[24, 8, 4]), "its arrays are of ranks"),
        "another width": (partition(embedding_dim=32), "its arrays are of ranks"),
        "arrays are no list": (key("arrays", {}), "not a list"),
        "no arrays": (key("arrays", []), "arrays end at 0"),
        "an array of text": (key("arrays", ["groups.0"]), "is described by 'groups.0'"),
        "a missing array": (without("groups.1"), "do not fit together"),
        "missing ids": (without("ids.2"), ""),
        "missing bounds": (without("bounds"), "do not fit together"),
        "an unknown array": (entry("parents", 0, "grandparents"), "holds grandparents"),
        "a level that is not there": (entry("groups.2", 0, "groups.3"), "holds groups.3"),
        "a level that is no number": (entry("groups.2", 0, "groups.two"), "holds groups.two"),
        "a list without a level": (entry("groups.2", 0, "groups"), "holds groups"),
        "a name twice": (entry("groups.2", 0, "groups.1"), "occurs twice"),
        "a name that is none": (entry("groups.2", 0, 7), "is no name"),
        "an unknown dtype": (entry("groups.2", 1, "complex64"), "unknown dtype 'complex64'"),
        "another dtype": (entry("ids.2", 1, "float32"), "do not fit together"),
        "another shape": (entry("groups.2", 2, [37, 4, 32]), "do not fit together|checksum"),
        "the same size in another shape": (entry("groups.1", 2, [7, 32, 9]), "do not fit together"),
        "a negative length": (entry("groups.2", 2, [-38, 4, 32]), "has the shape"),
        "a fractional length": (entry("groups.2", 2, [38.0, 4, 32]), "has the shape"),
        "a length of 0": (entry("groups.2", 2, [0, 8]), r"has the shape \[0, 8\]"),
        "no length": (entry("parent_bias", 2, []), "do not fit together|end at|begins at"),
        "a huge length": (entry("groups.2", 2, [2**62, 2**62, 2**62]), "begins at|end at"),
        "an offset in the header": (entry("groups.0", 3, 0), "begins at byte 0"),
        "a negative offset": (entry("groups.0", 3, -4096), "begins at byte -4096"),
        "an offset that is not aligned": (entry("groups.0", 3, 4097), "begins at byte 4097"),
        "an offset that overlaps": (entry("exact.0", 3, 4096), "begins at byte 4096"),
        "an offset behind the end": (entry("parent_bias", 3, 4096 * 10**6), "arrays end at"),
        "an offset of text": (entry("groups.0", 3, "4096"), "has the offset '4096'"),
        "no checksum": (entry("groups.0", 4, None), "the checksum None"),
    }  # fmt: skip


@pytest.mark.parametrize("edit", edits())
def test_headers_that_make_no_sense_are_told(edit, path):
    change, match = edits()[edit]
    header = header_of(path)
    change(header)
    write_header(path, header)
    if match:
        assert_told(path, match)
        if "ids.2" not in match:
            assert_told(path, match, verify=False)
    else:
        # Nothing in the file says that this level was reordered: its absence shows in the length of the file alone.
        TopKIndex.load(path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"nul", b'{"arrays": NaN}', b"[" * 3_000, b"\xff\xfe\xfd", b"9" * 3_900]
)
def test_headers_that_are_not_json_are_told(text, path):
    write_header(path, text)
    assert_told(path, "is not JSON|does not hold", verify=False)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_other_versions_are_told(version, path):
    write_header(path, header_of(path), version=version)
    assert_told(
        path, f"has format version {version} and this cprec_kernels reads 2; read it with the version that wrote"
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [(7, -1), (7, 300 - 1), (7, 1_517), (7, 2**31 - 1), (7, -(2**31)), (7, 305), (-1, 0), (1_217, 0)],
)
def test_ids_that_are_not_the_levels_are_found(place, value, path):
    """With checksums that are right: an id beyond the catalogue is a place in memory that a search would read. Padding
    begins at 1217."""
    header = header_of(path)
    entry = next(e for e in header["arrays"] if e[0] == "ids.2")
    data = bytearray(path.read_bytes())
    size = 4 * entry[2][0]
    ids = torch.frombuffer(data, dtype=torch.int32, offset=entry[3], count=entry[2][0])
    assert ids[place] != value
    ids[place] = value
    del ids
    entry[4] = zlib.crc32(data[entry[3] : entry[3] + size])
    path.write_bytes(data)
    write_header(path, header)
    assert_told(path, r"ids.2 do not name every item of 300..1516 once")


# Writing


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_appears_whole_or_not_at_all(failing, path, module, monkeypatch):
    before = path.read_bytes()
    index = module.build_index("float32")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(failing, full)
        with pytest.raises(OSError, match="No space left"):
            index.save(path)
        with pytest.raises(OSError, match="No space left"):
            index.save(path.with_name("new.index"))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == before
    index.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert TopKIndex.load(path).storage == "float32"


def test_places_that_cannot_be_written_are_told(module, tmp_path):
    index = module.build_index()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        index.save(tmp_path / "nowhere" / "a.index")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        index.save(tmp_path / "folder")
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["folder"]


def test_a_full_disk_is_named_with_the_file(module, path, small_disk):
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"File too large: '.*catalogue\.index'"):
        module.build_index("float32").save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link_and_a_pipe_is_refused(tmp_path):
    index = ClusteredSoftmaxWithLoss(8, Partition(60, [20], [8, 4], 8)).build_index()
    (tmp_path / "link").symlink_to("real")
    index.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").is_file()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a pipe or a device"):
        index.save(tmp_path / "pipe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]
