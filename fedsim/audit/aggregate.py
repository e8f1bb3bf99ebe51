"""What secure aggregation cost: the sum the server got beside the exact one.

Only the auditor can say: it alone holds what each client uploaded.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.audit.vault import Vault, VaultRecord
from fedsim.view import SavedViews, ServerView


def aggregation_cost(folder: Path, channel: dict[str, Any]) -> dict[str, float]:
    """Compare every aggregate with the weighted mean of the uploads behind it.

    Parameters
    ----------
    folder : Path
        A run folder.
    channel : dict
        The channel's figures in ``federation.json``; ``clipping_range`` and ``max_weight`` say
        what was clipped.

    Returns
    -------
    dict
        ``relative_error``: norm of the error over the norm of the exact mean; ``largest_error``;
        ``error_std``: standard deviation of the error of the values that nobody had clipped, which
        is that of rounding; ``clipped_share``: share of the uploaded values that were clipped.
        Each is the worst of all rounds; empty where no aggregate, or no upload, was kept.
    """
    vault = Vault(folder / "vault")
    worst: dict[str, float] = {}
    for view in SavedViews(folder / "views"):
        records = [vault.record(sender, view.round) for sender in view.senders]
        whole = [r for r in records if r is not None and r.upload is not None]
        if len(whole) < len(view.senders):
            continue
        for name, value in _compared(view, whole, channel).items():
            worst[name] = max(worst.get(name, 0.0), value)
    return worst


def _compared(
    view: ServerView, records: list[VaultRecord], channel: dict[str, Any]
) -> dict[str, float]:
    weights = torch.tensor([len(r.indices) for r in records], dtype=torch.float64)
    squared_error = squared_norm = squared_rounding = largest = 0.0
    clipped = values = rounded = 0
    for name, got in view.received.items():
        uploads = torch.stack([_upload(r)[name].double() for r in records])
        shares = (weights / weights.sum()).view(-1, *[1] * got.ndim)
        exact = (shares * uploads).sum(dim=0)
        error = got.double() - exact
        squared_error += float((error**2).sum())
        squared_norm += float((exact**2).sum())
        largest = max(largest, float(error.abs().max()))
        scaled = uploads * weights.view(-1, *[1] * got.ndim) / channel["max_weight"]
        over = scaled.abs() > channel["clipping_range"]
        squared_rounding += float((error[~over.any(dim=0)] ** 2).sum())
        rounded += int((~over.any(dim=0)).sum())
        clipped += int(over.sum())
        values += uploads.numel()
    return {
        "relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
        "largest_error": largest,
        "error_std": (squared_rounding / rounded) ** 0.5 if rounded else 0.0,
        "clipped_share": clipped / values,
    }


def _upload(record: VaultRecord) -> dict[str, Tensor]:
    assert record.upload is not None
    return record.upload
