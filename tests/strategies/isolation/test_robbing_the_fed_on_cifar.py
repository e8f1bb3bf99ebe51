"""Robbing the Fed on CIFAR-10 through the whole federation: the share, and how exact each one is.

Clients hold training images; the attacker takes its cut-offs from the brightness of half of the
test images.  Every round meets the initial model: the server's steps are too small to matter.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsim import reconstructions
from tests.fedsim.small import federated
from tests.strategies.isolation.one_client import alone_in_bin, best_psnr, dense_cutoffs
from tests.strategies.isolation.trapped_federation import needs_cifar, plug_in_cifar


def batches(folder: Path, units: int, rounds: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield of each batch of 64 who is alone in its bin, every PSNR, and the brightest image."""
    ran = federated(
        folder,
        {
            "threat-model": "G",
            "attack": f"robbing-the-fed(units={units})",
            "data.dataset": "cifar",
            "model.name": "convnet(width=8)",
            "federation.clients": 8,
            "federation.rounds": rounds,
            "federation.local": "fedsgd(batch_size=64, lr=1e-9)",
        },
    )
    assert ran.failures == []
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    found, _ = reconstructions.load(path)
    for index, view in enumerate(ran.views):
        record = ran.vault.record(view.senders[0], view.round)
        assert record is not None
        truth, candidates = record.examples.double(), found.examples[found.views == index]
        brightest = int(truth.flatten(1).mean(dim=1).argmax())
        yield alone_in_bin(truth, dense_cutoffs(view)), best_psnr(truth, candidates), brightest


@needs_cifar
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("units", "low", "high", "rounds"), [(256, 0.73, 0.83, 4), (1000, 0.9, 0.96, 2)]
)
def test_the_share_of_batches_of_64_and_how_exact_it_is(
    units: int,
    low: float,
    high: float,
    rounds: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plug_in_cifar(monkeypatch)
    seen = list(batches(tmp_path, units, rounds))
    alone, psnr = (torch.cat(parts) for parts in ([a for a, _, _ in seen], [p for _, p, _ in seen]))
    share, law = float((psnr >= 30).double().mean()), (1 - 1 / units) ** 63
    top = [float(psnr[at]) for alone, psnr, at in seen if alone[at]]
    print(
        f"{units} bins, {len(seen)} batches of 64: {share:.3f} at 30 dB, law {law:.3f}, alone "
        f"{alone.double().mean():.3f}; alone: lowest {psnr[alone].min():.1f}, median "
        f"{psnr[alone].median():.1f} dB; brightest images alone: {len(top)}, lowest "
        f"{min(top):.1f} dB"
    )
    assert low <= share <= high
    assert float((psnr[alone] > 60).double().mean()) >= 0.99
    assert top
    assert min(top) > 60  # of n bins n are read, not n - 1
