"""Replies on disk instead of in memory, read when a strategy asks for them.

A round of 500 clients then costs the memory of one model, whatever Flower strategy aggregates.
"""

from collections.abc import Callable
from io import SEEK_END, BytesIO
from typing import IO

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray


class LazyArray(Array):
    """A Flower ``Array`` whose values are computed or read each time they are asked for."""

    def __init__(
        self, dtype: str, shape: tuple[int, ...], load: Callable[[], NDArray[np.generic]]
    ) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype="numpy.ndarray", load=load)

    def numpy(self) -> NDArray[np.generic]:
        """Return the values."""
        values: NDArray[np.generic] = self.__dict__["load"]()
        return values

    @property
    def data(self) -> bytes:
        """The bytes Flower would send."""
        data: bytes = Array(self.numpy()).data
        return data

    @data.setter
    def data(self, _: bytes) -> None:
        raise AttributeError("a LazyArray is read-only")


def lazily(array: Array, change: Callable[[NDArray[np.generic]], NDArray[np.generic]]) -> LazyArray:
    """Return ``change(array)``, computed when asked for; shape and type must stay."""
    return LazyArray(array.dtype, tuple(array.shape), lambda: change(array.numpy()))


def computed(arrays: ArrayRecord) -> ArrayRecord:
    """Return a record whose every array is there already."""
    return ArrayRecord(
        {n: Array(a.numpy()) if isinstance(a, LazyArray) else a for n, a in arrays.items()}
    )


def spooled(arrays: ArrayRecord, file: IO[bytes]) -> ArrayRecord:
    """Move the bytes of a record to a file's end and return a record that reads them back.

    Raises
    ------
    OSError
        If the disk is full.
    """
    record, offset = ArrayRecord(), file.seek(0, SEEK_END)
    for name, array in arrays.items():
        size = file.write(array.data)
        record[name] = LazyArray(array.dtype, tuple(array.shape), _reader(file, offset, size))
        offset += size
    file.flush()
    return record


def _reader(file: IO[bytes], start: int, size: int) -> Callable[[], NDArray[np.generic]]:
    def load() -> NDArray[np.generic]:
        file.seek(start)
        # Just these bytes: an array cut short must not go on in the next client's.
        values: NDArray[np.generic] = np.load(BytesIO(file.read(size)), allow_pickle=False)
        return values

    return load
