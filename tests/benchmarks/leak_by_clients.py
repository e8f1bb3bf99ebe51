"""Leak rate against the number of clients and of local steps, for any attacks.

    python tests/benchmarks/leak_by_clients.py "loki(units=64)" "robbing-the-fed(units=64)"
        [--clients 2 8 32] [--steps 0 8] [--images 16] [--channel "secagg(max_weight=16)"]
        [--data photo-tiles|cifar10] [--seeds 1 2 3]

Each client holds as many images as ``--images`` says, all of them different, and all take part in
one round.  Steps: 0 uploads the gradient of all images (``fedsgd``); T > 0 takes T steps over them
(``fedavg``) and uploads weights.  Attacks that cannot read what is uploaded show the reason.  A
row is one attack; a figure the share of images at 20 dB or more, and beside it the law of images
that are alone in one of ``units`` bins, in the sum of all clients and in a client's own block.
CIFAR-10 comes from the folder that ``FEDSIM_TEST_DATA`` names.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fedsim import registry
from fedsim.data import Split, load_dataset
from fedsim.engines.inline import run_inline
from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario


@dataclass(frozen=True)
class Setting:
    """One cell of the table."""

    attack: str
    clients: int
    steps: int
    images: int
    channel: str
    model: str
    lr: float
    data: str
    seed: int

    @property
    def local(self) -> str:
        """What a client does in a round."""
        if self.steps == 0:
            return f"fedsgd(batch_size={self.images}, lr={self.lr})"
        return f"fedavg(epochs=1, batch_size={self.images // self.steps}, lr={self.lr})"


def pool(data: str) -> tuple[Split, Split, int]:
    """Return the images that clients draw from, other images like them, and the classes."""
    if data != "cifar10":
        loaded = load_dataset(data)
        return loaded.train, loaded.test, len(loaded.classes)
    folder = Path(os.environ["FEDSIM_TEST_DATA"]) / "cifar10"
    splits = []
    for name in ("train_1", "test_1"):
        with np.load(folder / f"{name}.npz") as stored:
            labels = torch.from_numpy(stored["y"]).long()
            splits.append(Split(torch.from_numpy(stored["x"]), labels))
    return splits[0], splits[1], 10


def write_data(setting: Setting, file: Path) -> None:
    """Write as many images as all clients hold, distinct ones, and the attacker's own."""
    private, other, classes = pool(setting.data)
    wanted = setting.clients * setting.images
    generator = torch.Generator().manual_seed(setting.seed)
    order = torch.randperm(len(private), generator=generator)[:wanted]
    if len(order) < wanted:
        raise SystemExit(f"{setting.data} has {len(private)} images, {wanted} are wanted")
    content = {
        "images": private.images[order],
        "labels": private.labels[order],
        "test_images": other.images.contiguous(),
        "test_labels": other.labels,
    }
    names = json.dumps([str(label) for label in range(classes)])
    save_file(content, file, metadata={"classes": names})


def leak_rate(setting: Setting) -> tuple[float, float]:
    """Run one federation and return the share of images leaked, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.safetensors"
        write_data(setting, file)
        scenario = Scenario.from_flat(
            {
                "threat-model": "H",
                "attack": setting.attack,
                "channel": setting.channel,
                "seed": setting.seed,
                "federation.clients": setting.clients,
                "federation.local": setting.local,
                "federation.threads": torch.get_num_threads(),
                "data.dataset": f"tensors(path='{file}')",
                "model.name": setting.model,
                "output.dir": folder,
            }
        )
        started = time.perf_counter()
        page = run_inline(scenario, "tests/benchmarks/leak_by_clients.py")
        report = json.loads((page.parent / "report.json").read_text())
    return report["leak"]["leak_rate"], time.perf_counter() - started


def alone(attack: str, images: int) -> float | None:
    """Return the share of images that are alone in one of the attack's bins."""
    units = registry.parse(attack, "attack")[0].arguments.get("units")
    return float((1 - 1 / int(units)) ** (images - 1)) if units else None


def line(setting: Setting, seeds: list[int]) -> str:
    """Return one cell's figures, the mean over seeds."""
    measured = []
    for seed in seeds:
        try:
            measured.append(leak_rate(Setting(**{**vars(setting), "seed": seed})))
        except ScenarioError as error:
            return f"{setting.clients:8}{setting.steps:7}  not possible: {str(error)[:90]}"
    rates, seconds = zip(*measured, strict=True)
    laws = [alone(setting.attack, n) for n in (setting.images * setting.clients, setting.images)]
    told = "".join(f"{'':>10}" if law is None else f"{law:10.3f}" for law in laws)
    share = f"{np.mean(rates):8.3f}"
    return f"{setting.clients:8}{setting.steps:7}{share}{told}{np.mean(seconds):9.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("attacks", nargs="+")
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--channel", default="secagg")
    parser.add_argument("--model", default="convnet(width=8)")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--data", default="photo-tiles")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{chosen.data}, {chosen.images} images a client, {chosen.channel}, seeds {chosen.seeds}")
    head = f"{'clients':>8}{'steps':>7}{'leaked':>8}{'law sum':>10}{'law own':>10}{'seconds':>9}"
    for attack in chosen.attacks:
        print(f"\n{attack}\n{head}", flush=True)
        for steps in chosen.steps:
            for clients in chosen.clients:
                setting = Setting(
                    attack, clients, steps, chosen.images, chosen.channel,
                    chosen.model, chosen.lr, chosen.data, 0,
                )  # fmt: skip
                print(line(setting, chosen.seeds), flush=True)


if __name__ == "__main__":
    main()
