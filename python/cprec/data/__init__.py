"""Interaction data: readers, the prepared folder, training windows, a synthetic generator and known data sets."""

from .catalogue import Catalogue
from .download import DATASETS, Dataset, prepare_dataset
from .errors import DataError, DownloadError, Progress
from .prepare import prepare
from .readers import FORMATS, Interactions, detect_format, scan_interactions
from .sequences import EvaluationSplit, PreparedData, Sequences
from .splits import SPLITS
from .summary import PreparedSummary, summarise
from .synthetic import generate, prepare_synthetic, write_interactions
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
