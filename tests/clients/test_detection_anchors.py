"""The known anchors of detection, measured by clients of real federations on what servers sent.

Garov et al. (ICLR 2024) and our own measurements at batches of 64: an honest model's D-SNR is near
``1 / (B - 1)``, class fishing's is what the images of one class give, an isolated image is far
above 1, and Robbing the Fed is invisible by layers and plain by rows, rank and duplicates.
"""

from pathlib import Path
from typing import Any

import pytest

from fedsim.audit.vault import Vault, VaultRecord
from fedsim.parts import Parts, check
from fedsim.run import federate
from fedsim.run_folder import RunFolder, plainly
from tests.fedsim.small import inline, scenario

B = 64
WATCHED: dict[str, Any] = {
    "defenses": "d-snr | row-d-snr | gradient-concentration | structure",
    "federation.clients": 2,
    "federation.local": f"fedsgd(batch_size={B}, lr=0.1)",
    "data.dataset": "photo-tiles",
    "model.name": "convnet(stride=2)",
}


def watched(folder: Path, changes: dict[str, Any]) -> list[VaultRecord]:
    """Run a federation, not the reconstruction, and return what its clients measured."""
    wanted = scenario(folder, {**WATCHED, **changes})
    parts = Parts(wanted)
    check(parts)
    made = RunFolder.create(wanted, run_id=7, engine="inline", command="a test")
    with inline(made, wanted) as (grid, context), plainly(made):
        federate(parts, grid, context, made)
    return list(Vault(made.path / "vault"))


def test_an_honest_model_is_benign(tmp_path: Path) -> None:
    records = watched(tmp_path, {"attack": "none"})
    assert len(records) == 2
    for record in records:
        assert 1 / (B - 1) < record.checks["d-snr"] < 0.1
        assert record.checks["gradient-concentration"] < 0.4
        assert record.checks["structure/duplicate-rows"] == 0
        assert record.checks["structure/zero-rows"] == 0


def test_class_fishing_leaves_the_images_of_one_class(tmp_path: Path) -> None:
    """One client holds five images of the class, the other a single one, which stands alone."""
    attack = "fishing(then='inverting-gradients', target=3)"
    records = watched(tmp_path, {"attack": attack})
    counts = {int((record.labels == 3).sum()): record.checks for record in records}
    assert sorted(counts) == [1, 5], "another draw of batches: choose a class of one and of some"
    assert 0.3 < counts[5]["d-snr"] < 0.7
    assert counts[1]["d-snr"] > 1e9
    for left, checks in counts.items():
        assert checks["gradient-concentration"] >= 1 - left / B - 1e-6
        assert checks["structure/zero-rows"] == pytest.approx(0.9)
        assert checks["structure/huge-bias"] > 1


def test_feature_fishing_leaves_fewer_and_fewer_until_one_stands_alone(tmp_path: Path) -> None:
    records = watched(
        tmp_path,
        {
            "attack": "fishing(then='inverting-gradients', by='feature')",
            "data.dataset": "digits",
            "data.partition": "pathological(num_classes_per_partition=1)",
            "federation.local": "fedsgd(batch_size=16, lr=0.1)",
            "federation.clients": 4,
            "federation.rounds": 6,
        },
    )
    # The roll call moves no weight but the head's, and is plain by its arrays alone.
    called = [record.checks for record in records if record.round == 1]
    assert all(checks["d-snr"] < 0.3 for checks in called)
    assert all(checks["structure/zero-rows"] == 1 for checks in called)
    asked = [record.checks for record in records if record.round > 1]
    assert all(checks["structure/one-weight"] == 1 for checks in asked)
    assert max(checks.get("d-snr", 0) for checks in asked) > 5


def test_an_imprint_is_invisible_by_layers_and_plain_by_rows_and_rank(tmp_path: Path) -> None:
    attack = {"attack": "robbing-the-fed(units=256)", "threat-model": "G"}
    for record in watched(tmp_path, attack):
        assert record.checks["d-snr"] < 0.1
        assert record.checks["row-d-snr"] < 0.2
        assert record.checks["row-d-snr/differences"] > 0.5
        assert record.checks["structure/duplicate-rows"] == 1
        assert record.checks["structure/low-rank"] > 0.99
        assert record.checks["structure/equal-columns"] == 1
        assert record.checks["structure/huge-bias"] > 0.3
