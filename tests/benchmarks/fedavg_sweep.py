"""Attacks on local training, by epochs and batch sizes: docs/methods/fedavg-sweep.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/fedavg_sweep.py [--epochs 1 2 5 10]
        [--batches 1 2 5] [--images 10] [--clients 1] [--iterations 300] [--simulate-up-to 100]
        [--data cifar10] [--out runs/fedavg-sweep] [--page docs/methods/fedavg-sweep.md]

One federation for each pair of epochs and batch size, E x B, is captured once, with the same
images in all of them, and every attack then works on that capture (``fedsim attack``), at threat
model C and with the same rule for labels.  Cheap cells come first, and the page is written after
each row.  Finished cells are kept in ``--out``, one file each, so that the command goes on where it
stopped; delete them when an attack changes.  More local steps than ``--simulate-up-to`` are not
simulated: an iteration costs as many gradients as there are steps; ``rog``, which rehearses on
surrogates too, goes to a fifth of them.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fedsim.data import Split, load_dataset
from fedsim.engines.inline import run_inline
from fedsim.reattack import attack_again
from fedsim.run import write_report
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/fedavg_sweep.py"
MODEL, RATE = "convnet(stride=2)", 0.01
# {n} stands for the iterations.
ATTACKS = {
    "inverting-gradients": "inverting-gradients(iterations={n}, tv=1e-2, labels='fedavg-counts')",
    "agic": "agic(iterations={n})",
    "sme": "sme(iterations={n})",
    "inverting-gradients, simulated": "inverting-gradients(iterations={n}, tv=1e-2, "
    "labels='fedavg-counts', simulate=True)",
    "fedavg-leakage": "fedavg-leakage(iterations={n})",
    "rog": "rog(pairs=32, steps=200, labels='fedavg-counts')",
}
# All others do with C; this one trains on images like the clients'.
WITH_SURROGATES = {"rog"}
# Those that go through the local steps, and how much dearer a step is for them.
SIMULATING = {"inverting-gradients, simulated": 1, "fedavg-leakage": 1, "rog": 5}
HEAD = """# Local training, by epochs and batch size

{images} images of each of {clients} client(s) ({data}), `{model}`, untrained, rate {rate},
each epoch in an order of its own, {iterations} iterations of one start: fewer than the papers',
so that the rows compare methods and say little of what each can reach. All attacks work on the
same captures, at threat model C (`rog`, which learns from other images of the data set and has its
own number of iterations, at D), with labels by `fedavg-counts`. Mean PSNR in dB, matched one to one
by the auditor, and in parentheses the leaked images (20 dB); "floor" is the best guess that sees no
update, "-" was not run. `inverting-gradients` is applied blindly, as if there had been one step.

One command: `{command}`.

| E x B | steps | floor | {names} |
| --- | --- | --- |{rules}
"""
COST = """
## Cost

Gradient evaluations, and seconds on a machine that did other things too:

| E x B | {names} |
| --- |{rules}
"""


@dataclass(frozen=True)
class Sweep:
    """What is the same in all cells."""

    images: int
    clients: int
    iterations: int
    data: str
    out: Path

    def key(self, *more: object) -> str:
        """Return a name for what is run with these settings."""
        told = f"{self.images} {self.clients} {self.data} {MODEL} {RATE} {more}"
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def pool(data: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Return the images that clients draw from, other images like them, and the classes."""
    if data != "cifar10":
        loaded = load_dataset(data)
        return loaded.train, loaded.test, loaded.classes
    splits = []
    for name in ("train_1", "test_1"):
        file = Path(os.environ["FEDSIM_TEST_DATA"]) / "cifar10" / f"{name}.npz"
        with np.load(file) as stored:
            labels = torch.from_numpy(stored["y"]).long()
            splits.append(Split(torch.from_numpy(stored["x"]), labels))
    return splits[0], splits[1], tuple(str(label) for label in range(10))


def write_data(sweep: Sweep) -> Path:
    """Write the clients' images, the same in every cell, and others like them."""
    private, other, classes = pool(sweep.data)
    drawn = torch.randperm(len(private), generator=torch.Generator().manual_seed(1))
    chosen = drawn[: sweep.images * sweep.clients]
    content = {
        "images": private.images[chosen].contiguous(),
        "labels": private.labels[chosen].contiguous(),
        "test_images": other.images[:1000].contiguous(),
        "test_labels": other.labels[:1000].contiguous(),
    }
    file = sweep.out / f"{sweep.key('data')}.safetensors"
    save_file(content, file, metadata={"classes": json.dumps(classes)})
    return file


def captured(sweep: Sweep, epochs: int, batch: int) -> Path:
    """Return the folder of a run that holds what the server saw in this cell."""
    place = sweep.out / "captures" / sweep.key(epochs, batch)
    if place.exists():
        return place.resolve()
    scenario = Scenario.from_flat(
        {
            "title": f"{epochs} x {batch}",
            "threat-model": "C",
            "attack": "sme(iterations=1)",
            "model.name": MODEL,
            "data.dataset": f"tensors(path='{write_data(sweep)}')",
            "federation.clients": sweep.clients,
            "federation.threads": 1,
            "federation.local": f"fedavg(epochs={epochs}, batch_size={batch}, lr={RATE})",
            "output.dir": str(sweep.out),
        }
    )
    folder = run_inline(scenario, "fedavg_sweep.py").parent
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(folder)
    return folder


def attacked(sweep: Sweep, epochs: int, batch: int, attack: str) -> dict[str, Any]:
    """Return how an attack did in a cell; from its file, where it was run before."""
    expression = ATTACKS[attack].format(n=sweep.iterations)
    file = sweep.out / f"{sweep.key(epochs, batch, expression)}.json"
    if file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    run = RunFolder(captured(sweep, epochs, batch))
    letter = "D" if attack in WITH_SURROGATES else "C"
    folder = attack_again(run, expression, {"threat-model": letter}, "fedavg_sweep.py")
    write_report(folder)
    report = json.loads((folder.path / "report.json").read_text())
    leak, cost = report["leak"], report["attack"]
    result = {
        "psnr": leak["psnr"]["mean"],
        "leaked": leak["leaked"],
        "of": leak["private_examples"],
        "floor": leak["floor"]["psnr"]["mean"],
        "seconds": cost["seconds"],
        "evaluations": cost["gradient_evaluations"],
    }
    shutil.rmtree(folder.path)
    file.write_text(json.dumps(result))
    print(f"-- {epochs} x {batch}, {attack}: {result['psnr']:.1f} dB", flush=True)
    return result


Row = dict[str, dict[str, Any] | None]


def page(sweep: Sweep, rows: dict[tuple[int, int], Row], command: str) -> str:
    """Return the page of the rows that are there."""
    names = " | ".join(f"`{name.partition(',')[0]}`{name.partition(',')[2]}" for name in ATTACKS)
    known = {"model": MODEL, "rate": RATE, "command": command, "names": names}
    told = {key: getattr(sweep, key) for key in ("images", "clients", "iterations", "data")}
    text = HEAD.format(**known, **told, rules=" --- |" * len(ATTACKS))
    for (epochs, batch), row in sorted(rows.items()):
        cells = [f"{one['psnr']:.1f} ({one['leaked']})" if one else "-" for one in row.values()]
        floor = next(one["floor"] for one in row.values() if one)
        steps = local_steps(sweep, epochs, batch)
        text += f"| {epochs} x {batch} | {steps} | {floor:.1f} | {' | '.join(cells)} |\n"
    text += COST.format(names=names, rules=" --- |" * len(ATTACKS))
    for (epochs, batch), row in sorted(rows.items()):
        cells = [
            f"{one['evaluations']:,} ({one['seconds']:.0f} s)" if one else "-"
            for one in row.values()
        ]
        text += f"| {epochs} x {batch} | {' | '.join(cells)} |\n"
    return text


def local_steps(sweep: Sweep, epochs: int, batch: int) -> int:
    """Return how many steps a client takes."""
    return epochs * ceil(sweep.images / batch)


def main(argv: Sequence[str]) -> None:
    """Run what is not in the cache, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 5, 10])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 5])
    numbers = {"images": 10, "clients": 1, "iterations": 300, "simulate-up-to": 100}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data", choices=["cifar10", "photo-tiles"], default="cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/fedavg-sweep"))
    parser.add_argument("--page", type=Path, default=Path("docs/methods/fedavg-sweep.md"))
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    sweep = Sweep(chosen.images, chosen.clients, chosen.iterations, chosen.data, chosen.out)
    sweep.out.mkdir(parents=True, exist_ok=True)
    hidden = {"--out", str(chosen.out), "--page", str(chosen.page)}
    command = " ".join([COMMAND, *(word for word in argv if word not in hidden)])
    pairs = [(epochs, batch) for epochs in chosen.epochs for batch in chosen.batches]
    rows: dict[tuple[int, int], Row] = {}
    for epochs, batch in sorted(pairs, key=lambda pair: pair[0] / pair[1]):
        steps = local_steps(sweep, epochs, batch)
        rows[epochs, batch] = {
            name: attacked(sweep, epochs, batch, name)
            if SIMULATING.get(name, 0) * steps <= chosen.simulate_up_to
            else None
            for name in ATTACKS
        }
        chosen.page.write_text(page(sweep, rows, command))


if __name__ == "__main__":
    main(sys.argv[1:])
