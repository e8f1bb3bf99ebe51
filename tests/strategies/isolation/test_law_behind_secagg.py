"""The occupancy law behind the real SecAgg+: who is alone in a bin of the sum comes back.

The whole federation, keys, shares, masks and quantization included; the attacker gets one sum of
``C`` clients with ``B`` images each.  Photograph tiles, no two equally bright, and cut-offs from
the pool's own empirical distribution: the expected share is ``(1 - 1/n)^(B*C - 1)``.  Every round
meets the initial model: the server's steps are too small to matter.  An image counts as read out
at 50 dB, an error of 0.8 of 255 gray levels: quantization leaves nearly every single image above
that, but for one in hundreds that hardly moves the model.  Of those that share a bin a few percent
reach it too, where two tiles are nearly the same or one of them hardly moves the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsim import adversary, reconstructions
from fedsim.data import DataSet
from tests.fedsim.small import federated, plug_in
from tests.strategies.isolation.one_client import (
    PHOTOGRAPHS,
    alone_in_bin,
    best_psnr,
    dense_cutoffs,
    tiles,
)

READ_OUT = 50.0


@pytest.fixture(autouse=True)
def _pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients draw from the distinct tiles, and the attacker knows how bright exactly those are."""
    names = tuple(load.__name__ for load in PHOTOGRAPHS)
    plug_in(monkeypatch, "dataset", "distinct-tiles", lambda: DataSet(tiles(), tiles(), names))
    monkeypatch.setattr(adversary, "split_test", lambda *_: (tiles(), tiles()))


@dataclass(frozen=True)
class Summed:
    """One round's images ``[B * C]``: which are alone in a bin of the sum, and each best PSNR."""

    alone: Tensor
    psnr: Tensor


def rounds_behind_secagg(
    folder: Path, *, units: int, clients: int, batch: int, rounds: int, seed: int
) -> Iterator[Summed]:
    ran = federated(
        folder,
        {
            "threat-model": "G",
            "attack": f"robbing-the-fed(units={units})",
            "channel": f"secagg(max_weight={batch})",
            "data.dataset": "distinct-tiles",
            "federation.clients": clients,
            "federation.rounds": rounds,
            "federation.local": f"fedsgd(batch_size={batch}, lr=1e-9)",
            "seed": seed,
        },
    )
    assert ran.failures == []
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    found, _ = reconstructions.load(path)
    for index, view in enumerate(ran.views):
        assert view.senders == tuple(range(clients))
        records = [ran.vault.record(client, view.round) for client in view.senders]
        truth = torch.cat([record.examples.double() for record in records if record])
        assert len(truth) == clients * batch
        candidates = found.examples[found.views == index]
        yield Summed(alone_in_bin(truth, dense_cutoffs(view)), best_psnr(truth, candidates))


def test_whoever_is_alone_in_the_sum_is_read_and_nobody_else(tmp_path: Path) -> None:
    (one,) = rounds_behind_secagg(tmp_path, units=64, clients=4, batch=8, rounds=1, seed=0)
    assert 0 < one.alone.sum() < 32
    assert torch.equal(one.psnr >= READ_OUT, one.alone)


@pytest.mark.slow
@pytest.mark.parametrize(("units", "clients", "batch"), [(64, 4, 8), (256, 8, 8)])
def test_the_share_read_out_of_the_sum_follows_the_law(
    units: int, clients: int, batch: int, tmp_path: Path
) -> None:
    seen = [
        one
        for seed in range(5)
        for one in rounds_behind_secagg(
            tmp_path, units=units, clients=clients, batch=batch, rounds=12, seed=seed
        )
    ]
    alone = torch.cat([one.alone for one in seen])
    psnr = torch.cat([one.psnr for one in seen])
    read = psnr >= READ_OUT
    law = (1 - 1 / units) ** (clients * batch - 1)
    print(
        f"{units} bins, {clients} x {batch}, {len(seen)} sums: law {law:.3f}, read "
        f"{read.double().mean():.3f}, alone {alone.double().mean():.3f}; alone: lowest "
        f"{psnr[alone].min():.1f}, median {psnr[alone].median():.1f} dB; sharing: "
        f"{int(read[~alone].sum())} of {int((~alone).sum())} at {READ_OUT:g} dB"
    )
    assert float(alone.double().mean()) == pytest.approx(law, abs=0.03)
    assert float(read[alone].double().mean()) >= 0.99
    assert float(read[~alone].double().mean()) <= 0.06
