"""Known public data sets: where they are, their published checksums, and how to fetch them.

A download goes to ``NAME.part`` in the cache folder and takes its name only when it is complete and its checksum is
right. An interrupted one is resumed with an HTTP range request, where the checksum or the server's ETag or
Last-Modified can tell that both halves are of one file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import DataError, DownloadError, Progress, no_progress
from .files import check_target, digest, new_file
from .prepare import prepare
from .sequences import PreparedData

_BLOCK = 1 << 20
_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A public data set.

    Attributes:
        url: where it is. member: the file to read inside a zip archive, None where ``url`` is the file itself.
        format: of that file. md5: as published by the owner, None where the owner publishes none (then only the size
            the server announces is checked). about: one line. options: further arguments of :func:`prepare`.
    """

    name: str
    url: str
    member: str | None
    format: str
    md5: str | None
    about: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def filename(self) -> str:
        return self.url.rsplit("/", 1)[-1]


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_AMAZON = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_FIVE_CORE = {"min_item_count": 5, "min_sequence_length": 5}


def _movielens(name: str, member: str, format: str, md5: str, about: str) -> Dataset:
    return Dataset(name, f"{_GROUPLENS}{name}.zip", member, format, md5, f"MovieLens, {about}")


def _amazon(name: str, category: str) -> Dataset:
    about = f"Amazon ratings 1996-2014, {category.replace('_', ' ')}, cut to users and items with 5 ratings or more"
    return Dataset(name, f"{_AMAZON}ratings_{category}.csv", None, "amazon", None, about, _FIVE_CORE)


DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        _movielens("ml-100k", "ml-100k/u.data", "ml-100k", "0e33842e24a9c977be4e0107933c0723", "100,000 ratings"),
        _movielens("ml-1m", "ml-1m/ratings.dat", "ml-1m", "c4d9eecfca2ab87c1945afe126590906", "1 million ratings"),
        _movielens(
            "ml-10m", "ml-10M100K/ratings.dat", "ml-1m", "ce571fd55effeba0271552578f2648bd", "10 million ratings"
        ),
        _movielens("ml-20m", "ml-20m/ratings.csv", "csv", "cd245b17a1ae2cc31bb14903e1204af3", "20 million ratings"),
        _movielens("ml-25m", "ml-25m/ratings.csv", "csv", "6b51fb2759a8657d3bfcbfc42b592ada", "25 million ratings"),
        _amazon("amazon-beauty", "Beauty"),
        _amazon("amazon-games", "Video_Games"),
        _amazon("amazon-sports", "Sports_and_Outdoors"),
        _amazon("amazon-toys", "Toys_and_Games"),
        _amazon("amazon-books", "Books"),
    )
}


def find_dataset(name: str) -> Dataset:
    """The data set of that name. Raises DataError that lists the known ones."""
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known are: {', '.join(DATASETS)}")
    return DATASETS[name]


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/cprec`` or ``~/.cache/cprec``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cprec"


def prepare_dataset(
    name: str,
    out: str | Path,
    *,
    cache: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    opener: urllib.request.OpenerDirector | None = None,
    dataset: Dataset | None = None,
    **options: Any,
) -> PreparedData:
    """Fetch a known data set unless the cache has it, unpack it and prepare it.

    Args:
        name: one of ``DATASETS``. out: the folder to write. cache: where downloads are kept, see :func:`default_cache`.
        options: further arguments of :func:`prepare`; those that are not None go before the data set's own.
        dataset: use this one instead of looking ``name`` up. opener: how to reach the network.

    Raises:
        DownloadError: no network, a broken transfer, a wrong checksum; the message says what to do by hand.
        DataError: unknown name, ``out`` exists, or as :func:`prepare`.
    """
    dataset = dataset or find_dataset(name)
    check_target(Path(out), overwrite)
    folder = Path(cache) if cache is not None else default_cache()
    archive = fetch(dataset, folder, out=out, progress=progress, opener=opener)
    source = unpack(dataset, archive, progress=progress)
    given = {option: value for option, value in options.items() if value is not None}
    merged = {"format": dataset.format, "name": dataset.name, **dataset.options, **given}
    return prepare(source, out, overwrite=overwrite, progress=progress, **merged)


def fetch(
    dataset: Dataset,
    cache: str | Path,
    *,
    out: str | Path = "prepared",
    progress: Progress | None = None,
    opener: urllib.request.OpenerDirector | None = None,
    attempts: int = 3,
) -> Path:
    """The data set's file in ``cache``, downloaded if it is not there.

    Args:
        out: folder named in the advice of the error message. attempts: transfers tried before giving up; each goes on
            where the one before broke off.

    Raises:
        DownloadError: see :func:`prepare_dataset`.
    """
    cache, tell = Path(cache), progress or no_progress
    path = cache / dataset.filename
    if path.is_file():
        _check(dataset, path)
        return path
    cache.mkdir(parents=True, exist_ok=True)
    part = cache / f"{dataset.filename}.part"
    opener = opener or urllib.request.build_opener()
    for attempt in range(1, attempts + 1):
        try:
            complete = _transfer(dataset, part, opener, tell)
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            if attempt == attempts or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                raise _by_hand(dataset, path, part, out, _reason(error)) from None
            complete = False
            time.sleep(0.2 * attempt)
        if complete:
            break
    else:
        raise _by_hand(dataset, path, part, out, "the connection broke off before the end")
    try:
        _check(dataset, part)
    finally:
        _note(part).unlink(missing_ok=True)
    part.replace(path)
    return path


def unpack(dataset: Dataset, archive: Path, *, progress: Progress | None = None) -> Path:
    """The data file itself: ``member`` of a zip archive, unpacked beside it once, or ``archive`` where there is none.

    Raises:
        DataError: the archive is damaged or has no such member.
    """
    if dataset.member is None:
        return archive
    target = archive.parent / dataset.name / Path(dataset.member).name
    try:
        with zipfile.ZipFile(archive) as opened:
            try:
                info = opened.getinfo(dataset.member)
            except KeyError:
                raise DataError(f"the archive has no {dataset.member}", archive) from None
            if not (target.is_file() and target.stat().st_size == info.file_size):
                (progress or no_progress)("unpacking", 0, info.file_size)
                with new_file(target) as work, opened.open(info) as source, work.open("wb") as file:
                    shutil.copyfileobj(source, file, _BLOCK)
    except zipfile.BadZipFile as error:
        raise DataError(f"is not a sound zip archive ({error}); delete it and fetch it again", archive) from None
    return target


def _transfer(dataset: Dataset, part: Path, opener: urllib.request.OpenerDirector, tell: Progress) -> bool:
    """One transfer into ``part``, from where it ends. Returns whether the file is complete."""
    have = part.stat().st_size if part.is_file() else 0
    validator = _read_note(part, dataset.url)
    if have and validator is None and dataset.md5 is None:
        have = 0  # nothing could tell whether the file has changed at the server since
    request = urllib.request.Request(dataset.url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        response = opener.open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        # asked for bytes after the end: the part is complete, or of another file
        total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if total and int(total[1]) == have:
            return True
        part.unlink()
        return False
    with response:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        resumed = response.status == 206 and span is not None and int(span[1]) == have
        if not resumed:
            have = 0
        length = response.headers.get("Content-Length")
        total_bytes = have + int(length) if length and length.isdecimal() else None
        etag = response.headers.get("ETag", "")
        strong = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        _note(part).write_text(json.dumps({"url": dataset.url, "validator": strong}), "utf-8")
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(_BLOCK):
                file.write(block)
                have += len(block)
                tell(f"downloading {dataset.filename}", have, total_bytes)
    return total_bytes is None or have == total_bytes


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path, url: str) -> str | None:
    """The validator stored when ``part`` was begun, if it was begun from ``url``."""
    with contextlib.suppress(OSError, ValueError):
        note = json.loads(_note(part).read_text("utf-8"))
        if isinstance(note, dict) and note.get("url") == url and isinstance(note.get("validator"), str):
            return str(note["validator"])
    return None


def _check(dataset: Dataset, path: Path) -> None:
    """Compare with the published checksum; a wrong file is deleted when it is a partial download."""
    if dataset.md5 is None:
        return
    found = digest(path, "md5")
    if found == dataset.md5:
        return
    again = "delete it and run the command again"
    if path.suffix == ".part":
        path.unlink()
        again = "it was deleted; run the command again, and if this repeats, the file at the server is another one"
    raise DownloadError(f"has the checksum {found}, published is {dataset.md5} (md5); {again}", path)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(reason) or type(error).__name__


def _by_hand(dataset: Dataset, path: Path, part: Path, out: str | Path, reason: str) -> DownloadError:
    """The error that tells what to fetch elsewhere and how to go on with it."""
    extra = "".join(f" --{key.replace('_', '-')} {value}" for key, value in dataset.options.items())
    kept = part.stat().st_size if part.is_file() else 0
    lines = [
        f"cannot download {dataset.url}: {reason}.",
        *([f"The first {kept:,} bytes are kept; the same command goes on from there."] if kept else []),
        "Without a network here, fetch that file on another machine"
        + (f" (md5 {dataset.md5})" if dataset.md5 else "")
        + " and either",
        f"  put it at {path} and run the same command again, or",
    ]
    if dataset.member:
        lines += [
            f"  unpack {dataset.member} from it and run",
            f"    cprec prepare {Path(dataset.member).name} --out {out} --format {dataset.format}{extra}",
        ]
    else:
        lines += ["  run", f"    cprec prepare {dataset.filename} --out {out} --format {dataset.format}{extra}"]
    return DownloadError("\n".join(lines))
