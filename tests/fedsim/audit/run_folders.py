"""A run folder as a run leaves it, made of real photographs and known reconstructions.

Half of each client's images come back exactly, a quarter under noise, a quarter not at all.
"""

import json
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedsim import reconstructions
from fedsim.attack import Cost, Reconstruction
from fedsim.audit.vault import VaultRecord, deposit
from fedsim.data import load_dataset
from fedsim.reconstructions import Facts

CLIENTS, BATCH = 4, 8
SCENARIO: dict[str, Any] = {
    "title": "A made-up run",
    "threat-model": "F",
    "attack": "robbing-the-fed",
    "oracles": "none",
    "defenses": "none",
    "channel": "plain",
    "seed": 7,
    "federation": {
        "clients": CLIENTS,
        "rounds": 1,
        "fraction": 1.0,
        "strategy": "fedavg",
        "local": "fedsgd(batch_size=8, lr=0.1)",
        "timeout": 600.0,
        "device": "cpu",
        "precision": "float32",
        "threads": 0,
    },
    "data": {"dataset": "photo-tiles", "partition": "iid"},
    "model": {"name": "convnet", "batchnorm": "frozen"},
    "audit": {"criterion": "psnr>=20", "baseline": True},
    "output": {"dir": "runs"},
}
FEDERATION: dict[str, Any] = {
    "clients": CLIENTS,
    "rounds": 1,
    "rounds_done": 1,
    "seconds": 12.5,
    "round_seconds": [11.9],
    "failures": [{"round": 1, "client": 2, "reason": "timed out, then answered"}],
    "bytes_up": 12_345_678,
    "bytes_down": 23_456_789,
    "accuracy": {"before": 0.11, "after": 0.34, "baseline_after": 0.41},
    "receipts": ["sent a modified model to 4/4 clients in round 1"],
    "channel": {"name": "plain"},
    "defenses_expected": [],
    "manipulation": {
        "accuracy": 0.09,
        "honest_accuracy": 0.11,
        "models_measured": 1,
        "parameters": 1_800_000,
        "honest_parameters": 100_000,
        "bytes": 7_200_000,
        "honest_bytes": 400_000,
    },
}
EVENTS = ["started", "round", "federated", "reconstructed", "finished"]


def build(
    folder: Path,
    *,
    scenario: dict[str, Any] | None = None,
    federation: dict[str, Any] | None = None,
    receipts: list[dict[str, Any]] | None = None,
    used: tuple[str, ...] = ("updates", "basics"),
    oracles: tuple[str, ...] = (),
    with_labels: bool = True,
) -> Path:
    """Write a whole run folder; ``scenario`` and ``federation`` replace top-level keys."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**SCENARIO, **(scenario or {})}
    (folder / "scenario.toml").write_text(tomli_w.dumps(settings))
    environment = {
        "versions": {"python": "3.11", "torch": torch.__version__},
        "device": "cpu",
        "engine": "inline",
        "seed": settings["seed"],
        "command": "fedsim run scenarios/made-up.toml",
        "repeat": "fedsim run scenario.toml --engine inline",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    told = {**FEDERATION, **(federation or {})}
    (folder / "federation.json").write_text(json.dumps(told))
    lines = [json.dumps({"time": float(at), "event": name}) for at, name in enumerate(EVENTS)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    split = load_dataset(settings["data"]["dataset"]).train
    noise = torch.Generator().manual_seed(0)
    examples, views, labels = [], [], []
    for client in range(CLIENTS):
        rows = torch.arange(BATCH) * 53 + client * 7
        images, truth = split.batch(rows)
        record = VaultRecord(client, 1, images, truth, torch.arange(BATCH), receipts=receipts or [])
        deposit(folder / "vault", record)
        quarter = BATCH // 4
        strengths = torch.linspace(0.03, 0.2, quarter).view(-1, 1, 1, 1)
        part = images[2 * quarter : 3 * quarter]
        noisy = part + strengths * torch.randn(part.shape, generator=noise)
        unrelated = torch.rand(images[:quarter].shape, generator=noise)
        examples.append(torch.cat([unrelated, noisy.clamp(0, 1), images[: 2 * quarter]]))
        views.append(torch.full((BATCH,), client))
        order = [*range(3 * quarter, BATCH), *range(2 * quarter, 3 * quarter), *range(2 * quarter)]
        labels.append(truth[order])
    if settings["attack"] == "none":
        return folder
    result = Reconstruction(
        examples=torch.cat(examples),
        views=torch.cat(views),
        labels=torch.cat(labels) if with_labels else None,
        cost=Cost(3.25, 0),
        receipts=("read 32 candidates from 4 views",),
    )
    facts = Facts(
        expression=settings["attack"],
        name=settings["attack"].partition("(")[0],
        paper="Fowl et al.: Robbing the Fed, ICLR 2022",
        used=used,
        oracles=oracles,
        view_labels=tuple(f"round-1-client-{client}" for client in range(CLIENTS)),
        senders=tuple((client,) for client in range(CLIENTS)),
        rounds=(1,) * CLIENTS,
    )
    reconstructions.save(folder / "reconstructions", result, facts)
    return folder
