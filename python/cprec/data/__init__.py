"""Interaction data: readers, the prepared folder, training windows, a synthetic generator and known data sets."""

from typing import TYPE_CHECKING, Any

from .catalogue import Catalogue
from .download import DATASETS, Dataset, prepare_dataset
from .errors import DataError, DownloadError, Progress
from .prepare import prepare
from .readers import FORMATS, Interactions, detect_format, scan_interactions
from .sequences import EvaluationSplit, PreparedData, Sequences
from .splits import SPLITS
from .summary import PreparedSummary, summarise
from .synthetic import generate, prepare_synthetic, write_interactions

if TYPE_CHECKING:
    from .windows import EvaluationWindows, TrainingWindows, collate

__all__ = [
    "DATASETS",
    "FORMATS",
    "SPLITS",
    "Catalogue",
    "DataError",
    "Dataset",
    "DownloadError",
    "EvaluationSplit",
    "EvaluationWindows",
    "Interactions",
    "PreparedData",
    "PreparedSummary",
    "Progress",
    "Sequences",
    "TrainingWindows",
    "collate",
    "detect_format",
    "generate",
    "prepare",
    "prepare_dataset",
    "prepare_synthetic",
    "scan_interactions",
    "summarise",
    "write_interactions",
]


def __getattr__(name: str) -> Any:
    # Windows are tensors, and importing torch takes seconds: whoever prepares data has no need of it.
    if name in ("EvaluationWindows", "TrainingWindows", "collate"):
        from . import windows

        return getattr(windows, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
