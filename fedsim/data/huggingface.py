"""Any image classification set of the Hugging Face hub, or a local copy of one."""

from contextlib import suppress
from typing import Annotated, Any

import torch
from pydantic import Field

from fedsim.data.dataset import DataSet, Split
from fedsim.data.holdout import hold_out
from fedsim.data.pictures import stack, to_tensor
from fedsim.registry import register


@register("dataset", "huggingface")
def huggingface(
    *,
    name: str,
    subset: str | None = None,
    image: str = "image",
    label: str = "label",
    size: Annotated[int, Field(gt=0)] | None = None,
) -> DataSet:
    """Return the splits ``train`` and ``test`` (or a fifth of ``train``) as ``flwr_datasets`` does.

    Pictures are gray if the first one is, else RGB.  ``flwr_datasets`` reports its use to
    Flower Labs unless ``FLWR_TELEMETRY_ENABLED=0``.  With ``FEDSIM_OFFLINE=1`` only a local folder
    or what Hugging Face's cache holds is read, and nothing reported.

    Parameters
    ----------
    name : str
        For instance ``"uoft-cs/cifar10"``, or a local folder that ``datasets`` can read.
    subset : str or None
        The hub's configuration of the set.
    image, label : str
        Names of the columns.
    size : int or None
        Side of the square to which pictures are resized and cropped; needed where sizes differ.

    Raises
    ------
    ValueError
        If the set cannot be had (no such name, offline and not cached), or lacks these columns.
    """
    splits = _fetch(name, subset)
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train', only {', '.join(splits)}")
    missing = {image, label} - set(splits["train"].column_names)
    if missing:
        columns = ", ".join(splits["train"].column_names)
        raise ValueError(f"{name} has no column {sorted(missing)[0]!r}; there is: {columns}")
    mode = "L" if splits["train"][0][image].mode in ("1", "L") else "RGB"
    names = _class_names(splits, label)
    parts = {
        split: Split(
            stack([to_tensor(picture, mode, size) for picture in rows[image]]),
            torch.tensor(_numbers(rows, label, names), dtype=torch.int64),
        )
        for split, rows in splits.items()
    }
    train, test = parts["train"], parts.get("test")
    if test is None:
        train, test = hold_out(train.images, train.labels)
    return DataSet(train, test, tuple(map(str, names)))


def _fetch(name: str, subset: str | None) -> dict[str, Any]:
    """Return the splits ``train`` and ``test``, as far as they exist."""
    from flwr_datasets import FederatedDataset  # slow to import: only where it is wanted

    try:
        federated = FederatedDataset(dataset=name, subset=subset, partitioners={}, shuffle=False)
        splits = {"train": federated.load_split("train")}
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {error}); check the name, or the "
            "network, or load it once where there is one and keep Hugging Face's cache"
        ) from error
    with suppress(ValueError):  # it has no such split
        splits["test"] = federated.load_split("test")
    return splits


def _class_names(splits: dict[str, Any], label: str) -> list[Any]:
    """Return the names that the set declares, else every value that occurs, sorted."""
    declared = getattr(splits["train"].features[label], "names", None)
    return declared or sorted({value for rows in splits.values() for value in rows[label]})


def _numbers(rows: Any, label: str, names: list[Any]) -> list[int]:
    """Return class numbers; a declared class label is one already."""
    if hasattr(rows.features[label], "names"):
        return list(rows[label])
    return [names.index(value) for value in rows[label]]
