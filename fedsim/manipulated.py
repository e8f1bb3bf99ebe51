"""What a manipulation does to the model: its accuracy and its size, beside the honest model's."""

from collections.abc import Callable, Mapping
from itertools import islice
from statistics import fmean
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, RecordDict

#: Models sent to one client each are measured for the first few clients only.
MODELS = 4


def manipulation_facts(
    honest: ArrayRecord,
    sent: Mapping[int, RecordDict],
    honest_accuracy: float | None,
    accuracy: Callable[[str, ArrayRecord], float | None],
) -> dict[str, Any]:
    """Compare what clients were sent in a round with what an honest server would have sent.

    Parameters
    ----------
    honest : ArrayRecord
        The model that the strategy would have sent.
    sent : Mapping[int, RecordDict]
        What each client was sent instead: ``arrays``, and ``config`` with the model's expression.
    honest_accuracy : float or None
        Of ``honest``, in ``[0, 1]``.
    accuracy : callable
        Of an expression and its arrays.

    Returns
    -------
    dict
        The fields of :class:`fedsim.audit.schema.Sent`; sizes are the largest that a client got.
    """
    records = [cast(ArrayRecord, content["arrays"]) for content in sent.values()]
    distinct = {tuple(map(id, arrays.values())): content for arrays, content in
                zip(records, sent.values(), strict=True)}  # fmt: skip
    found = [
        accuracy(str(content.config_records["config"]["model"]), content.array_records["arrays"])
        for content in islice(distinct.values(), MODELS)
    ]
    measured = [value for value in found if value is not None]
    return {
        "accuracy": fmean(measured) if measured else None,
        "honest_accuracy": honest_accuracy,
        "models_measured": len(measured),
        "parameters": max(map(_parameters, records)),
        "honest_parameters": _parameters(honest),
        "bytes": max(map(_bytes, records)),
        "honest_bytes": _bytes(honest),
    }


def _parameters(arrays: ArrayRecord) -> int:
    """Count values; an index into a sparse layer is none."""
    floating = (a for a in arrays.values() if np.issubdtype(np.dtype(a.dtype), np.floating))
    return sum(int(np.prod(array.shape)) for array in floating)


def _bytes(arrays: ArrayRecord) -> int:
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays.values())
