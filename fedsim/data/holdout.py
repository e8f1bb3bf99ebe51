"""A test split for data that comes without one."""

import torch
from torch import Tensor

from fedsim.data.dataset import Split


def hold_out(images: Tensor, labels: Tensor, test_fraction: float = 0.2) -> tuple[Split, Split]:
    """Split into train and test, the same way every time.

    The test examples of each class lie evenly spaced among that class's examples, so that an order
    in the source (by writer, by person, by date) falls on both sides.  A class keeps at least one
    example in train.

    Parameters
    ----------
    images : Tensor
        ``[N, C, H, W]``.
    labels : Tensor
        ``[N]``, int64.
    test_fraction : float
        In ``[0, 1)``; rounded down within each class.
    """
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten()
        count = min(int(len(members) * test_fraction), len(members) - 1)
        if count:
            middle = (torch.arange(count, dtype=torch.float64) + 0.5) * (len(members) / count)
            is_test[members[middle.long()]] = True
    return Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])
