"""Which candidate is meant to be which private image.

One-to-one within a view (Hungarian method), against every private image behind that view; one
matching serves all metrics.  Over views, an image keeps its best match.

The cost of a pair is the logarithm of its mean squared error, so the matching of the best mean
PSNR wins.  The plain error would give leaks away: squares prefer two middling pairs to one perfect
and one hopeless pair (a dark image returned exactly, beside a black candidate for a bright image,
goes to the bright one).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.audit.metrics import clamped
from fedsim.audit.vault import VaultRecord

_CHUNK = 1024
_SMALLEST = 1e-14


@dataclass(frozen=True)
class PrivateSet:
    """The private images behind some views, each once.

    Attributes
    ----------
    images : Tensor
        ``[U, C, H, W]`` in ``[0, 1]``.
    labels, clients, indices, rounds : Tensor
        ``[U]`` int64; an image is known by client and index, ``rounds`` is where it was seen first.
    behind : tuple of Tensor
        For each view, the rows of the images behind it.
    """

    images: Tensor
    labels: Tensor
    clients: Tensor
    indices: Tensor
    rounds: Tensor
    behind: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.images)


def private_set(behind: Sequence[Sequence[VaultRecord]]) -> PrivateSet:
    """Gather the records behind each view into one set in which every image appears once.

    Raises
    ------
    ValueError
        If there is no record at all, or the images are of different shapes.
    """
    rows: dict[tuple[int, int], int] = {}
    images, labels, rounds, per_view = [], [], [], []
    for records in behind:
        seen: dict[int, None] = {}
        for record in records:
            for at, index in enumerate(record.indices.tolist()):
                key = (record.client, index)
                if key not in rows:
                    rows[key] = len(rows)
                    images.append(record.examples[at])
                    labels.append(int(record.labels[at]))
                    rounds.append(record.round)
                seen[rows[key]] = None
        per_view.append(torch.tensor(list(seen), dtype=torch.int64))
    if not images:
        raise ValueError("there are no private images behind these views")
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"private images are of different shapes: {sorted(shapes)}")
    keys = torch.tensor(list(rows), dtype=torch.int64)
    return PrivateSet(
        images=torch.stack(images),
        labels=torch.tensor(labels, dtype=torch.int64),
        clients=keys[:, 0],
        indices=keys[:, 1],
        rounds=torch.tensor(rounds, dtype=torch.int64),
        behind=tuple(per_view),
    )


def errors(candidates: Tensor, truths: Tensor) -> Tensor:
    """Return the mean squared error of every pair, ``[M, N]`` float64.

    By |a - b|^2 = |a|^2 + |b|^2 - 2ab in blocks: right to about 1e-14, enough to rank by.
    """
    right = [clamped(block).flatten(1) for block in torch.split(truths, _CHUNK)]
    rows = []
    for block in torch.split(candidates, _CHUNK):
        left = clamped(block).flatten(1)
        columns = [
            left.square().sum(1, keepdim=True) + other.square().sum(1) - 2 * left @ other.T
            for other in right
        ]
        rows.append(torch.cat(columns, dim=1).clamp_min(0) / left.shape[1])
    return torch.cat(rows)


def match(candidates: Tensor, truths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Match candidates to truths one to one, the smaller side whole, at the best mean PSNR.

    Returns
    -------
    tuple of Tensor
        Positions among the candidates, positions among the truths, and their errors, each
        ``[min(M, N)]``.
    """
    if len(candidates) == 0 or len(truths) == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return nothing, nothing, torch.zeros(0, dtype=torch.float64)
    from scipy.optimize import linear_sum_assignment

    cost = errors(candidates, truths)
    logarithm = cost.clamp_min(_SMALLEST).log().numpy()
    rows, columns = (torch.as_tensor(np.asarray(x)) for x in linear_sum_assignment(logarithm))
    return rows, columns, cost[rows, columns]


def best_matches(candidates: Tensor, views: Tensor, private: PrivateSet) -> tuple[Tensor, Tensor]:
    """Match every view by itself and keep each private image's best candidate.

    Parameters
    ----------
    candidates : Tensor
        ``[M, C, H, W]``.
    views : Tensor
        ``[M]`` int64: the view each candidate was read from.

    Returns
    -------
    tuple of Tensor
        ``[U]`` int64 candidate of each image and ``[U]`` int64 view it came from; -1 where none.
    """
    chosen = torch.full((len(private),), -1, dtype=torch.int64)
    source = torch.full((len(private),), -1, dtype=torch.int64)
    least = torch.full((len(private),), torch.inf, dtype=torch.float64)
    for view, behind in enumerate(private.behind):
        mine = (views == view).nonzero().flatten()
        rows, columns, error = match(candidates[mine], private.images[behind])
        images = behind[columns]
        better = error < least[images]
        least[images[better]] = error[better]
        chosen[images[better]] = mine[rows[better]]
        source[images[better]] = view
    return chosen, source
