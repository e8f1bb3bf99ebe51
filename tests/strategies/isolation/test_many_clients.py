"""Behind the real SecAgg+ at 2 and at 32 clients: LOKI's share stays, Robbing the Fed's law falls.

LOKI meets the same 256 photograph tiles both times, eight a client, in sixteen sums of two clients
and in one of thirty-two.
"""

from pathlib import Path

import pytest
import torch

from fedsim import adversary
from fedsim.data import DataSet
from strategies.attacks.analytic.isolation.loki import Loki, expected_share
from tests.fedsim.small import Ran, federated, plug_in
from tests.strategies.isolation import test_law_behind_secagg as law_behind_secagg
from tests.strategies.isolation.one_client import PHOTOGRAPHS, best_psnr, tiles

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
UNITS, IMAGES = 32, 8
READ_OUT = 20.0  # so few bins are wide: the middle of one is off by some percent
# Robbing the Fed's read-out is exact, whatever the width of a bin.
EXACT = 50.0


@pytest.fixture(autouse=True)
def _pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight tiles a client that nobody else has; the attacker knows how bright tiles are."""

    def part(clients: int, at: int) -> DataSet:
        order = torch.randperm(len(tiles()), generator=torch.Generator().manual_seed(5))
        first = at * clients * IMAGES
        names = tuple(load.__name__ for load in PHOTOGRAPHS)
        return DataSet(tiles().subset(order[first : first + clients * IMAGES]), tiles(), names)

    part.__annotations__.update(clients=int, at=int)
    names = tuple(load.__name__ for load in PHOTOGRAPHS)
    plug_in(monkeypatch, "dataset", "part-of-tiles", part)
    plug_in(monkeypatch, "dataset", "distinct-tiles", lambda: DataSet(tiles(), tiles(), names))
    monkeypatch.setattr(adversary, "split_test", lambda *_: (tiles(), tiles()))


def loki_behind_secagg(folder: Path, clients: int, at: int) -> Ran:
    ran = federated(
        folder,
        {
            "threat-model": "G",
            "attack": f"loki(units={UNITS}, bins='empirical')",
            "channel": f"secagg(max_weight={IMAGES})",
            "data.dataset": f"part-of-tiles(clients={clients}, at={at})",
            "federation.clients": clients,
            "federation.local": f"fedavg(epochs=1, batch_size={IMAGES // 2}, lr=0.005)",
            "seed": at,
        },
    )
    assert ran.failures == []
    return ran


def read_by_owner(ran: Ran) -> int:
    """Return how many images stand in the block of the client that holds them."""
    (view,), attack = ran.views, ran.parts.attack
    assert isinstance(attack, Loki)
    images, _, clients, _ = attack.read(view, ran.parts.spec)
    count = 0
    for client in view.senders:
        record = ran.vault.record(client, 1)
        assert record is not None
        found = images[clients == client].view(-1, *ran.parts.spec.shape)
        count += int((best_psnr(record.examples.double(), found) >= READ_OUT).sum())
    return count


def test_loki_takes_the_same_share_of_32_clients_as_of_2(tmp_path: Path) -> None:
    law = expected_share(UNITS, IMAGES, 2, push_out=True)
    shares = {}
    for clients in (2, 32):
        parts = range(32 // clients)
        read = [
            read_by_owner(loki_behind_secagg(tmp_path / f"{clients}-{at}", clients, at))
            for at in parts
        ]
        shares[clients] = sum(read) / (32 * IMAGES)
    print(f"law {law:.3f}, shares {shares}")
    assert abs(shares[32] - shares[2]) <= 0.05
    # Tiles overlap: of two that share a bin one can be as near to the other as 20 dB.
    assert all(law - 0.08 <= share <= law + 0.12 for share in shares.values())


@pytest.mark.parametrize(("clients", "rounds"), [(2, 16), (8, 8), (32, 2)])
def test_robbing_the_fed_falls_with_the_images_of_all_clients(
    clients: int, rounds: int, tmp_path: Path
) -> None:
    units = 128
    seen = list(
        law_behind_secagg.rounds_behind_secagg(
            tmp_path, units=units, clients=clients, batch=IMAGES, rounds=rounds, seed=0
        )
    )
    read = torch.cat([one.psnr for one in seen]) >= EXACT
    alone = torch.cat([one.alone for one in seen])
    law = (1 - 1 / units) ** (clients * IMAGES - 1)
    share = float(read.double().mean())
    print(f"{clients} clients: law {law:.3f}, alone {alone.double().mean():.3f}, read {share:.3f}")
    assert share == pytest.approx(law, abs=0.08)
    assert share == pytest.approx(float(alone.double().mean()), abs=0.05)
