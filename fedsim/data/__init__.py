"""Data sets, and how they are split among clients."""

from fedsim.data.dataset import DataSet, DataSpec, Split, load_dataset
from fedsim.data.partition import partition, split_test

__all__ = ["DataSet", "DataSpec", "Split", "load_dataset", "partition", "split_test"]
