"""Who holds which training examples, and which half of the test split is public.

Partitions are Flower's own (``flwr_datasets.partitioner``), by name and parameters:
``DirichletPartitioner`` is ``dirichlet(alpha=0.5)``.  The range supplies the number of clients,
the column of labels and the seed.
"""

import re
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.data.dataset import Split
from fedsim.errors import ScenarioError
from fedsim.registry import Expression, check_arguments, nearest, parse, settable

KEY = "data.partition"
OURS = ("num_partitions", "partition_by", "seed")
UNFIT = {
    "continuous": "it wants a column of continuous values, and here are labels only",
    "distribution": "it wants a numpy array, which a scenario cannot hold",
    "grouped-natural-id": "it wants a column of ids, and here are labels only",
    "id-to-size-fnc": "it wants a function, which a scenario cannot hold",
    "natural-id": "it wants a column of ids, and here are labels only",
    "vertical-even": "it splits columns, not examples",
    "vertical-size": "it splits columns, not examples",
}


def partition(expression: str, labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Return each client's indices into the train split, sorted, int64.

    No index is in two partitions; all are in one unless the partitioner itself leaves some out
    (``size`` and ``inner-dirichlet`` with too small sizes, ``shard`` with a fixed ``shard_size``,
    ``pathological`` with classes that nobody drew).

    Parameters
    ----------
    expression : str
        For instance ``"iid"``, ``"dirichlet(alpha=0.5)"``, ``"shard(num_shards_per_partition=2)"``.
    labels : Tensor
        Labels of the train split, ``[N]``.
    clients : int
        Number of partitions.
    seed : int
        The scenario's public seed.

    Raises
    ------
    ScenarioError
        If the expression is wrong, or the partitioner cannot do it with these labels.
    """
    return list(_partition(expression, labels.long().numpy().tobytes(), clients, seed))


@lru_cache(maxsize=4)
def _partition(expression: str, labels: bytes, clients: int, seed: int) -> tuple[Tensor, ...]:
    found = parse(expression, KEY)
    if len(found) != 1:
        raise ScenarioError(KEY, expression, "exactly one partitioner is wanted here")
    label = np.frombuffer(labels, dtype=np.int64)
    if not 1 <= clients <= len(label):
        remedy = f"{len(label)} examples cannot be split among {clients} clients"
        raise ScenarioError(KEY, expression, f"{remedy}; use 1 to {len(label)} clients")
    # flwr_datasets cuts some partitions (iid, size, linear ...) in the order of the rows.
    order = torch.randperm(len(label), generator=seeds.generator(seed, "partition")).numpy()
    parts = _assign(found[0], order, label[order], clients, seeds.derive(seed, "partition"))
    _check(parts, expression, clients)
    return tuple(torch.from_numpy(np.sort(part)) for part in parts)


def _assign(
    expression: Expression, order: Any, label: Any, clients: int, seed: int
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    partitioner_class, arguments = _resolve(expression, clients, seed)
    from datasets import Dataset

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every failed attempt of Dirichlet's; the last raises
            partitioner = partitioner_class(**arguments)
            partitioner.dataset = Dataset.from_dict({"index": order, "label": label})
            return [
                np.asarray(partitioner.load_partition(client)["index"], dtype=np.int64)
                for client in range(partitioner.num_partitions)
            ]
    except (ValueError, TypeError, IndexError, KeyError, AssertionError) as error:
        raise ScenarioError(KEY, str(expression), f"{error} {_way_out(expression)}") from error


def _way_out(expression: Expression) -> str:
    if expression.name == "dirichlet":
        least = expression.arguments.get("min_partition_size", 10)
        return f"Raise alpha, lower min_partition_size (now {least}), or use fewer clients."
    return "Use fewer clients, or change the parameters."


def _resolve(expression: Expression, clients: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return the partitioner's class and all its arguments, checked."""
    known = partitioners()
    if expression.name not in known:
        reason = UNFIT.get(expression.name, "no partitioner has this name")
        raise ScenarioError(KEY, expression.name, f"{reason}; {nearest(expression.name, [*known])}")
    partitioner = known[expression.name]
    for name in OURS:
        if name in expression.arguments:
            remedy = "leave it out: the range sets it from federation.clients, the data and seed"
            raise ScenarioError(
                f"{KEY}: {expression.name}({name})", expression.arguments[name], remedy
            )
    arguments = check_arguments(partitioner, expression, KEY, ours=OURS)
    supplied = {"num_partitions": clients, "partition_by": "label", "seed": seed}
    ours = {name: supplied[name] for name in settable(partitioner) if name in supplied}
    return partitioner, {**arguments, **ours}


def partitioners() -> dict[str, Any]:
    """Return Flower's partitioners that split labeled examples, by hyphenated name."""
    from flwr_datasets import partitioner as flower  # heavy: only where a partition is wanted

    found = {}
    for class_name in flower.__all__:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", class_name.removesuffix("Partitioner")).lower()
        if name and name not in UNFIT:
            found[name] = getattr(flower, class_name)
    return found


def _check(parts: list[Any], expression: str, clients: int) -> None:
    if len(parts) != clients:
        remedy = (
            f"it makes {len(parts)} partitions; federation.clients is {clients}: make them equal"
        )
        raise ScenarioError(KEY, expression, remedy)
    empty = [client for client, part in enumerate(parts) if len(part) == 0]
    if empty:
        remedy = f"leaves {len(empty)} of {clients} clients without an example (the first is "
        remedy += f"{empty[0]}); use fewer clients, or change the parameters"
        raise ScenarioError(KEY, expression, remedy)


def split_test(split: Split, seed: int) -> tuple[Split, Split]:
    """Return two disjoint public halves of the test split: surrogate and holdout.

    The surrogate is what an attacker with that grant holds, and what the guessing floor draws
    from; accuracy is measured on the holdout, which gets the odd example.
    """
    order = torch.randperm(len(split), generator=seeds.generator(seed, "surrogate"))
    half = len(split) // 2
    return split.subset(order[:half].sort().values), split.subset(order[half:].sort().values)
