"""Models to carry away: a folder that is served with torch and this package's model code alone.

The folder holds config.json and weights.safetensors (a checkpoint, see :mod:`cprec.checkpoint`), and items.jsonl: one
line per item in the order of its number, ``["raw id", training count]``, for any JSON reader.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from cprec import checkpoint
from cprec.files import naming
from cprec.model import NextItNet
from cprec.ranking import popularity_scores, top_items
from cprec.serving_io import refuse_string

ITEMS_NAME = "items.jsonl"
README_NAME = "README.txt"
README = (
    "A next-item recommender exported by cprec: model = cprec.load(<this folder>); "
    'model.recommend([["item", ...]], k=10). items.jsonl names item 0, 1, ... with its training count.\n'
)
_BATCH = 512


class ExportedModel:
    """A model and the names of its items.

    Attributes:
        model: the NextItNet, in evaluation mode.
        items: raw ids (K,) in the order of item numbers.
        length: how many of the newest items the model sees.
    """

    def __init__(self, model: NextItNet, items: Sequence[str], counts: Sequence[int], length: int) -> None:
        self.model = model.eval()
        self.items = items
        self.length = length
        self._numbers = {item: number for number, item in enumerate(items)}
        self._popularity = popularity_scores(torch.tensor(counts))

    def encode(self, history: Iterable[str | int]) -> list[int]:
        """Item numbers of the known items of a history; unknown ones are left out.

        Raises:
            TypeError: an id that is neither a string nor an integer, such as a float, which would pass for unknown.
        """
        numbers = []
        for item in history:
            if isinstance(item, bool) or not isinstance(item, str | Integral):
                raise TypeError(f"item ids are strings or integers, got {item!r}")
            if (number := self._numbers.get(str(item))) is not None:
                numbers.append(number)
        return numbers

    def recommend(
        self,
        histories: Iterable[Iterable[str | int]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Iterable[str | int] | None = None,
        storage: str | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The k best next items of every history with their log-probabilities, best first.

        Args:
            histories: raw ids, oldest first. Unknown items are ignored; a history without a known item gets the most
                popular items, with the log of their share of the training interactions.
            k: items per history; fewer where fewer are left.
            exclude_seen: never recommend an item of the history.
            candidates: raw ids of the only items allowed.
            storage: "float32", "float16", "bfloat16" or "int8" searches an index of that format on the CPU, which the first
                call builds: for a server, whose calls of one history take about half of the time. The same items.

        Raises:
            ValueError: k below 1, no candidate is known, or an unknown storage.
            TypeError: a string was given for a history, for the histories or for the candidates; an id that is neither a string
                nor an integer.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        encoded = []
        for history in histories:
            refuse_string(history, "a history")
            encoded.append(self.encode(history))
        allowed = None
        if candidates is not None:
            refuse_string(candidates, "a whitelist")
            allowed = torch.tensor(sorted(set(self.encode(candidates))), dtype=torch.int64)
            if not len(allowed):
                raise ValueError("none of the candidates is an item of this model")
        return [
            [(self.items[item], score) for item, score in zip(best.items, best.scores, strict=True)]
            for start in range(0, len(encoded), _BATCH)
            for best in top_items(
                self.model,
                encoded[start : start + _BATCH],
                k,
                length=self.length,
                popularity=self._popularity,
                exclude_seen=exclude_seen,
                candidates=allowed,
                storage=storage,
            )
        ]

    def topk(self, histories: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        """:meth:`NextItNet.topk` on item numbers (B, L), padded on the left with ``len(items)``, without gradients."""
        with torch.inference_mode():
            return self.model.topk(histories, k, **options)

    def to(self, device: torch.device | str) -> ExportedModel:
        """Move the model; returns itself."""
        self.model.to(device)
        return self


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> ExportedModel:
    """Read an exported folder.

    Raises:
        CheckpointError: the model cannot be read, see :func:`cprec.checkpoint.load`.
        FileNotFoundError: a checkpoint without items, for instance a run folder, which has to be exported first.
        ValueError: items.jsonl is damaged or does not fit the model.
    """
    folder = Path(folder)
    config, sections = checkpoint.read_config(folder)
    about = sections.get("export", {})
    items, counts = read_items(folder, config.num_items, about)
    length = about.get("length")
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"{folder / checkpoint.CONFIG_NAME} lacks export.length: export the run again")
    return ExportedModel(checkpoint.load(folder, device), items, counts, length)


def read_items(folder: Path, num_items: int, about: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Raw ids and training counts of an exported folder whose model has so many items.

    Args:
        about: the section "export" of its configuration.

    Raises:
        FileNotFoundError: it has none. ValueError: another number of them, a damaged line, which is named, or the items of
            another export.
    """
    path = folder / ITEMS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; 'cprec export' makes folders that can be loaded")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # which an editor may put first
    lines = content.splitlines()
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # one call is much faster than one per line
    except ValueError:
        rows = []
    if len(rows) != len(lines) or not all(map(_is_item, rows)):
        for number, line in enumerate(lines, start=1):
            try:
                sound = _is_item(json.loads(line))
            except ValueError:
                sound = False
            if not sound:
                raise ValueError(f'{path}:{number}: expected ["raw id", count]; export the run again')
    items = [row[0] for row in rows]
    if len(set(items)) < len(items):
        lines_of: dict[str, int] = {}
        for number, item in enumerate(items, start=1):
            if (earlier := lines_of.setdefault(item, number)) != number:
                raise ValueError(f"{path}:{number}: item {item!r} is that of line {earlier}, too; export the run again")
    if len(items) != num_items:
        raise ValueError(f"{path}: holds {len(items):,} items, the model has {num_items:,}: export the run again")
    digest = hashlib.sha256(content).hexdigest()
    if about.get("items_sha256", digest) != digest:
        raise ValueError(
            f"{path} is not what was exported with this {checkpoint.CONFIG_NAME}: lines were changed, or a part of another "
            "export was copied here; export the run again"
        )
    return items, [row[1] for row in rows]


def _is_item(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and type(row[0]) is str and type(row[1]) is int


def export(
    run_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that :func:`load` reads, from the best weights of a run. It appears whole or not at all.

    Args:
        run_folder: of :func:`cprec.training.train`.
        data: the prepared data, if it is no longer where the run found it.
        overwrite: replace an earlier export; other folders are refused all the same.

    Raises:
        FileExistsError: ``out`` exists; FileNotFoundError: the prepared data is not there.
        ValueError: not a run folder, no weights in it yet, or the data is not the run's (by fingerprint).
    """
    from cprec.run_folder import RunConfig

    out = Path(out)
    run = RunConfig.read(run_folder)
    model = checkpoint.load(run_folder)
    prepared = run.open_data(data)
    catalogue = prepared.catalogue
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{out} exists: overwrite it, or choose another folder")
        known = {checkpoint.CONFIG_NAME, checkpoint.WEIGHTS_NAME, ITEMS_NAME, README_NAME}
        if not out.is_dir() or {entry.name for entry in out.iterdir()} != known:
            raise FileExistsError(f"{out} is not an earlier export and is left as it is: choose another folder")
    place = out.resolve()  # a link stays a link
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = place.parent / f".{place.name}.{uuid4().hex}.tmp"
    try:
        with naming(place):
            names = catalogue.decode(range(catalogue.num_items))
            lines = "".join(
                json.dumps([name, count], ensure_ascii=False) + "\n"
                for name, count in zip(names, catalogue.counts.tolist(), strict=True)
            ).encode()
            checkpoint.save(
                stage,
                model,
                extra={
                    "export": {"length": run.training.length, "items_sha256": hashlib.sha256(lines).hexdigest()},
                    "data": {
                        "name": run.data_name,
                        "fingerprint": run.data_fingerprint,
                        "split": prepared.meta["options"]["split"],
                    },
                },
            )
            (stage / ITEMS_NAME).write_bytes(lines)
            (stage / README_NAME).write_text(README, encoding="utf-8")
            _swap(stage, place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return out


def _swap(stage: Path, out: Path) -> None:
    """Give ``stage`` the name ``out``; an earlier folder of that name goes last, and comes back if the renaming fails."""
    old = stage.with_suffix(".old")
    if not out.exists():
        stage.rename(out)
        return
    out.rename(old)
    try:
        stage.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
