"""Memory, time and leak rate of LOKI and the sparse linear layer with a thousand clients.

    python tests/benchmarks/scale_of_manipulators.py [ATTACK ...] [--clients 1000] [--images 2]

CIFAR size (3 x 32 x 32; CIFAR-10 where ``FEDSIM_TEST_DATA`` has it, else random smooth pictures),
each client with as many images as ``--images`` says and four bins for each, behind the trusted
aggregator.  Peak is the resident memory of the one process that holds server and clients; sent is
what one client gets, so that both can be put side by side.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fedsim.engines.inline import run_inline
from fedsim.scenario import Scenario

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Measured:
    """What one run took."""

    peak: float
    seconds: float
    leak_rate: float
    sent: float
    received: float


def pictures(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``[N, 3, 32, 32]`` uint8 images and labels."""
    folder = Path(os.environ.get("FEDSIM_TEST_DATA", "/nowhere")) / "cifar10"
    if (folder / "train_1.npz").exists() and count <= 10_000:
        with np.load(folder / "train_1.npz") as stored:
            return torch.from_numpy(stored["x"])[:count], torch.from_numpy(stored["y"])[:count]
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    return (255 * smooth).byte(), torch.randint(10, (count,), generator=generator)


def write_data(file: Path, wanted: int) -> None:
    """Write the clients' images, and 400 others."""
    images, labels = pictures(wanted + 400, torch.Generator().manual_seed(1))
    content = {
        "images": images[:wanted].contiguous(),
        "labels": labels[:wanted].long().contiguous(),
        "test_images": images[wanted:].contiguous(),
        "test_labels": labels[wanted:].long().contiguous(),
    }
    classes = json.dumps([str(label) for label in range(10)])
    save_file(content, file, metadata={"classes": classes})


def measure(attack: str, clients: int, images: int) -> Measured:
    """Run one round with that many clients in this process."""
    torch.set_num_threads(1)
    local = f"fedsgd(batch_size={images}, lr=0.05)"
    if attack.startswith("loki"):
        local = f"fedavg(epochs=1, batch_size={max(images // 2, 1)}, lr=0.05)"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.safetensors"
        write_data(file, clients * images)
        scenario = Scenario.from_flat(
            {
                "threat-model": "G",
                "attack": attack,
                "channel": "trusted-sum",
                "federation.clients": clients,
                "federation.local": local,
                "federation.threads": 1,
                "data.dataset": f"tensors(path='{file}')",
                "model.name": "convnet(width=8)",
                "output.dir": folder,
            }
        )
        started = time.perf_counter()
        page = run_inline(scenario, "tests/benchmarks/scale_of_manipulators.py")
        seconds = time.perf_counter() - started
        report = json.loads((page.parent / "report.json").read_text())
    federation = report["federation"]
    return Measured(
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        seconds=seconds,
        leak_rate=report["leak"]["leak_rate"],
        sent=federation["bytes_down"] / clients / MIB,
        received=federation["bytes_up"] / clients / MIB,
    )


def main() -> None:
    """Print the table; each run is a process of its own, for its own peak."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("attacks", nargs="*", default=["loki", "sparse-linear-layer"])
    parser.add_argument("--clients", type=int, nargs="+", default=[1000])
    parser.add_argument("--images", type=int, default=2)
    chosen = parser.parse_args()
    head = f"{'peak GiB':>10}{'seconds':>9}{'leaked':>8}{'sent MiB':>10}{'back MiB':>10}"
    print(f"{'attack':44}{'clients':>8}{head}", flush=True)
    for attack in chosen.attacks:
        given = f"{attack}(units={4 * chosen.images}, bins='empirical')"
        for clients in chosen.clients:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                one = process.apply(measure, (given, clients, chosen.images))
            figures = f"{one.peak:10.2f}{one.seconds:9.0f}{one.leak_rate:8.3f}"
            sizes = f"{one.sent:10.2f}{one.received:10.2f}"
            print(f"{given:44}{clients:8}{figures}{sizes}", flush=True)


if __name__ == "__main__":
    main()
