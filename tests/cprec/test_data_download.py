"""Downloads from a server on this machine: resumed, checked, and explained when they cannot be had."""

import hashlib
import io
import re
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cprec.data import DATASETS, DataError, Dataset, DownloadError, prepare_dataset
from cprec.data.download import fetch, find_dataset, unpack

RATINGS = "".join(f"{user}::{item}::5::{978300000 + 10 * item + user}\n" for user in range(1, 9) for item in range(6))
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the machine is set to use


def archive(text=RATINGS, member="ml-9/ratings.dat"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(member, text)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves ``body``; ``cut`` is how many bytes of each answer are sent before the connection is closed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.cut, self.etag, self.ranges, self.log = archive(), None, '"one"', True, []

    def dataset(self, **changes):
        host, port = self.server_address[:2]
        values = {
            "name": "ml-9",
            "url": f"http://{host}:{port}/ml-9.zip",
            "member": "ml-9/ratings.dat",
            "format": "ml-1m",
            "md5": hashlib.md5(self.body).hexdigest(),
            "about": "for this test",
        }
        return Dataset(**(values | changes))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted, validator = self.headers.get("Range"), self.headers.get("If-Range")
        server.log.append((wanted, validator))
        if self.path != "/ml-9.zip":
            self.send_error(404)
            return
        start = 0
        if server.ranges and wanted and validator in (None, server.etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(server.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(server.body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        rest = server.body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest if server.cut is None else rest[: server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_prepare_dataset_fetches_unpacks_and_prepares(server, tmp_path):
    told = []
    data = prepare_dataset(
        "ml-9",
        tmp_path / "out",
        cache=tmp_path / "cache",
        dataset=server.dataset(),
        opener=OPENER,
        progress=lambda *step: told.append(step),
        split="time",
    )
    assert (data.name, data.num_users, data.num_items) == ("ml-9", 8, 6)
    assert data.meta["options"]["split"] == "time"
    assert data.meta["options"]["format"] == "ml-1m"
    assert ("downloading ml-9.zip", len(server.body), len(server.body)) in told
    assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == ["ml-9", "ml-9.zip"]
    again = prepare_dataset("ml-9", tmp_path / "again", cache=tmp_path / "cache", dataset=server.dataset())
    assert again.num_items == 6
    assert len(server.log) == 1  # the second time from the cache
    cut = server.dataset(options={"min_item_count": 9})
    with pytest.raises(DataError, match="min_item_count=9"):
        prepare_dataset("ml-9", tmp_path / "cut", cache=tmp_path / "cache", dataset=cut, min_item_count=None)
    assert (
        prepare_dataset("ml-9", tmp_path / "all", cache=tmp_path / "cache", dataset=cut, min_item_count=1).num_items
        == 6
    )


def test_a_broken_transfer_is_resumed_where_it_broke_off(server, tmp_path):
    server.cut = 100
    with pytest.raises(DownloadError, match="The first 100 bytes are kept"):
        fetch(server.dataset(), tmp_path, opener=OPENER, attempts=1)
    assert (tmp_path / "ml-9.zip.part").read_bytes() == server.body[:100]
    server.cut = None
    path = fetch(server.dataset(), tmp_path, opener=OPENER)
    assert path.read_bytes() == server.body
    assert server.log == [(None, None), ("bytes=100-", '"one"')]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ml-9.zip"]


def test_attempts_go_on_by_themselves(server, tmp_path):
    server.cut = len(server.body) // 2
    assert fetch(server.dataset(), tmp_path, opener=OPENER, attempts=3).read_bytes() == server.body
    assert len(server.log) >= 2


def test_a_file_that_changed_at_the_server_is_begun_anew(server, tmp_path):
    dataset = server.dataset(md5=None)
    server.cut = 100
    with pytest.raises(DownloadError):
        fetch(dataset, tmp_path, opener=OPENER, attempts=1)
    server.cut, server.body, server.etag = None, archive(RATINGS * 2), '"two"'
    assert fetch(dataset, tmp_path, opener=OPENER).read_bytes() == server.body


def test_without_checksum_and_validator_nothing_is_resumed(server, tmp_path):
    server.etag = None
    (tmp_path / "ml-9.zip.part").write_bytes(b"old")
    assert fetch(server.dataset(md5=None), tmp_path, opener=OPENER).read_bytes() == server.body
    assert server.log == [(None, None)]


def test_a_server_without_ranges_is_read_from_the_start(server, tmp_path):
    server.ranges = False
    (tmp_path / "ml-9.zip.part").write_bytes(server.body[:50])
    assert fetch(server.dataset(), tmp_path, opener=OPENER).read_bytes() == server.body


def test_a_part_that_was_complete_is_taken(server, tmp_path):
    (tmp_path / "ml-9.zip.part").write_bytes(server.body)
    assert fetch(server.dataset(), tmp_path, opener=OPENER).read_bytes() == server.body
    (tmp_path / "ml-9.zip").unlink()
    (tmp_path / "ml-9.zip.part").write_bytes(server.body + b"too much")
    assert fetch(server.dataset(), tmp_path, opener=OPENER).read_bytes() == server.body


def test_a_wrong_checksum_is_refused_and_deleted(server, tmp_path):
    dataset = server.dataset(md5="0" * 32)
    with pytest.raises(DownloadError, match=f"published is {'0' * 32}"):
        prepare_dataset("ml-9", tmp_path / "out", cache=tmp_path, dataset=dataset, opener=OPENER)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ml-9.zip").write_bytes(b"something else")
    with pytest.raises(DownloadError, match="delete it and run the command again"):
        fetch(dataset, tmp_path, opener=OPENER)


def test_without_a_network_the_message_says_what_to_do(server, tmp_path):
    dataset = server.dataset()
    host = server.server_address[0]
    unreachable = server.dataset(url=f"http://{host}:1/ml-9.zip")
    with pytest.raises(DownloadError) as caught:
        prepare_dataset("ml-9", tmp_path / "out", cache=tmp_path / "cache", dataset=unreachable, opener=OPENER)
    message = str(caught.value)
    assert f"cannot download {unreachable.url}" in message
    assert f"md5 {dataset.md5}" in message
    assert f"put it at {tmp_path / 'cache' / 'ml-9.zip'} and run the same command again" in message
    assert f"cprec prepare ratings.dat --out {tmp_path / 'out'} --format ml-1m" in message
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_not_tried_again(server, tmp_path):
    host, port = server.server_address[:2]
    with pytest.raises(DownloadError, match="the server answered 404"):
        fetch(server.dataset(url=f"http://{host}:{port}/moved.zip"), tmp_path, opener=OPENER)
    assert len(server.log) == 1


def test_damaged_archives(server, tmp_path):
    path = tmp_path / "ml-9.zip"
    path.write_bytes(server.body[:-30])
    with pytest.raises(DataError, match="not a sound zip archive"):
        unpack(server.dataset(), path)
    path.write_bytes(archive(member="other.txt"))
    with pytest.raises(DataError, match=r"has no ml-9/ratings.dat"):
        unpack(server.dataset(), path)
    assert [entry.name for entry in tmp_path.rglob("*") if entry.is_file()] == ["ml-9.zip"]


def test_an_existing_folder_is_refused_before_anything_is_fetched(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="exists already"):
        prepare_dataset("ml-9", tmp_path / "out", cache=tmp_path, dataset=server.dataset(), opener=OPENER)
    assert server.log == []


def test_known_datasets():
    with pytest.raises(DataError, match="unknown data set 'ml-2m'; known are: ml-100k, ml-1m"):
        find_dataset("ml-2m")
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.md5 is None or re.fullmatch(r"[0-9a-f]{32}", dataset.md5)
        assert dataset.member is not None or dataset.filename.endswith(".csv")
    assert {"ml-100k", "ml-1m", "ml-20m", "amazon-beauty"} <= set(DATASETS)


def test_a_weak_validator_does_not_vouch_for_a_part(server, tmp_path):
    dataset = server.dataset(md5=None)
    server.etag, server.cut = 'W/"one"', 100
    with pytest.raises(DownloadError):
        fetch(dataset, tmp_path, opener=OPENER, attempts=1)
    server.cut = None
    assert fetch(dataset, tmp_path, opener=OPENER).read_bytes() == server.body
    assert server.log[-1] == (None, None)


def test_an_unpacking_that_was_cut_short_is_done_again(server, tmp_path):
    prepare_dataset("ml-9", tmp_path / "one", cache=tmp_path / "cache", dataset=server.dataset(), opener=OPENER)
    (unpacked,) = (tmp_path / "cache").rglob("ratings.dat")
    whole = unpacked.read_bytes()
    unpacked.write_bytes(whole[:-20])
    prepare_dataset("ml-9", tmp_path / "two", cache=tmp_path / "cache", dataset=server.dataset(), opener=OPENER)
    assert unpacked.read_bytes() == whole
