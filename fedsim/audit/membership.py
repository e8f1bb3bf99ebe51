"""Whether an attack that asks who has an image was right: its answers beside the vault."""

from collections.abc import Mapping

import torch

from fedsim.attack import Reconstruction
from fedsim.audit.leak import EXACT, wilson
from fedsim.audit.metrics import mse
from fedsim.audit.schema import Membership
from fedsim.audit.vault import VaultRecord
from fedsim.reconstructions import Facts


def membership(
    reconstruction: Reconstruction, facts: Facts, records: Mapping[tuple[int, int], VaultRecord]
) -> Membership | str:
    """Judge every answer of which all the data asked about is known; or say why there is none.

    An image was there if one of the same pixels was (mean squared error below 1e-10), whatever its
    position in a data set.
    """
    assert reconstruction.present is not None
    assert reconstruction.whose is not None
    said, true = [], []
    for at, view in enumerate(reconstruction.views.tolist()):
        client = int(reconstruction.whose[at])
        asked = facts.senders[view] if client < 0 else (client,)
        behind = [records.get((one, facts.rounds[view])) for one in asked]
        whole = [record for record in behind if record is not None]
        if len(whole) < len(asked):
            continue
        image = reconstruction.examples[at : at + 1]
        held = [one.examples for one in whole if len(one.examples)]  # who refused used none
        true.append(any(bool((mse(image, examples) < EXACT).any()) for examples in held))
        said.append(bool(reconstruction.present[at]))
    if not said:
        return "the vault lacks the data that the attack asked about"
    return _judged(torch.tensor(said), torch.tensor(true))


def _judged(said: torch.Tensor, true: torch.Tensor) -> Membership:
    asked, present, answered = len(said), int(true.sum()), int(said.sum())
    right, found = int((said == true).sum()), int((said & true).sum())
    return Membership(
        asked=asked,
        present=present,
        found=found,
        alarms=answered - found,
        accuracy=right / asked,
        interval=wilson(right, asked),
        precision=found / answered if answered else None,
        recall=found / present if present else None,
        guess=max(present, asked - present) / asked,
    )
