"""Arrays that are one client's block of a larger one, which only the sum over clients holds whole.

A server that tailors the model may send each client a block of its own, and say where it lies: the
record ``places`` beside the arrays maps the array's name to ``[index, count]``.  Alone, the block
travels as it is.  In a sum it stands at ``index`` of ``[count, *shape]``, so that the blocks of
different clients do not mix; under masks each client sends that whole array, zero elsewhere,
because what is masked must have one shape and hides which of it is zero.
"""

from collections.abc import Mapping
from typing import cast

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

PLACES = "places"
Place = tuple[int, int]


def record_of(places: Mapping[str, Place]) -> ConfigRecord:
    """Return the record that says where a client's blocks lie."""
    return ConfigRecord({name: list(place) for name, place in places.items()})


def places_in(content: RecordDict) -> dict[str, Place]:
    """Return ``(index, count)`` of each array of a message that is a block."""
    told = content.config_records.get(PLACES, ConfigRecord())
    return {name: cast(Place, tuple(cast(list[int], place))) for name, place in told.items()}


def whole_shape(shape: tuple[int, ...], place: Place | None) -> tuple[int, ...]:
    """Return the shape that an array has in a sum."""
    return tuple(shape) if place is None else (place[1], *shape)


def whole(block: Tensor, place: Place | None) -> Tensor:
    """Return what a client uploads where all must have one shape: its block among zeros."""
    if place is None:
        return block
    index, count = place
    spread = block.new_zeros(count, *block.shape)
    spread[index] = block
    return spread
