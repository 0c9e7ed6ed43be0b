"""Data loading: files, `datasets` folders, the Hub and packaged corpora, all to `source` and `target` columns."""

from .arguments import SPLITS, DataArguments
from .corpora import PACKAGED_CORPORA
from .loading import load_data, split_by_source
from .preparation import DropCounts, PreparedData, prepare_data
from .readers import DataError
from .streaming import load_streamed_data, stream_train_data, tokenize_stream

__all__ = [
    "PACKAGED_CORPORA",
    "SPLITS",
    "DataArguments",
    "DataError",
    "DropCounts",
    "PreparedData",
    "load_data",
    "load_streamed_data",
    "prepare_data",
    "split_by_source",
    "stream_train_data",
    "tokenize_stream",
]
