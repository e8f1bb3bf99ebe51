"""Attacks on one gradient, all on the same 20 CIFAR-10 images: docs/methods/passive.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/passive_table.py [--iterations 300]
        [--methods NAME ...] [--networks lenet resnet20] [--out runs/passive]
        [--page docs/methods/passive.md]

The images are the training images 0, 500, 1000 ... 9500.  One federation for each network, state
(untrained; trained for an epoch on the first 10,000 training images) and batch size is captured
once, and every attack then works on that capture (``fedsim attack``) with the same iterations.
Batches of 1 and 4 take all 20 images, batches of 8 take 8 of each of two clients' ten.  Finished
cells are kept in ``--out``, one file each, so that the command goes on where it stopped; delete
them when an attack changes.
"""

import argparse
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from fedsim.engines.inline import run_inline
from fedsim.errors import NotGranted, RunFailed, ScenarioError
from fedsim.reattack import attack_again
from fedsim.run import write_report
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/passive_table.py"
PLACES = range(0, 10_000, 500)
NETWORKS = {
    "lenet": "lenet",
    "lenet-tanh": "lenet(activation='tanh', init='default')",
    "resnet20": "resnet20(width=8)",
}
SIZES = {1: 20, 4: 5, 8: 2}  # batch size: clients
# Expression, threat model, oracles; {n} stands for the iterations.
METHODS: dict[str, tuple[str, str, str]] = {
    "inverting-gradients": ("inverting-gradients(iterations={n}, tv=1e-2)", "B", "none"),
    "inverting-gradients, true labels": (
        "inverting-gradients(iterations={n}, tv=1e-2, labels='oracle')",
        "B",
        "labels",
    ),
    "dlg": ("dlg(batch_size={b}, iterations={n}, restarts=1)", "A", "none"),
    "idlg": ("idlg(iterations={n}, restarts=1)", "A", "none"),
    "see-through-gradients": (
        "see-through-gradients(iterations={n}, seeds=2, statistics='proxy')",
        "E",
        "none",
    ),
    "see-through-gradients, exact statistics": (
        "see-through-gradients(iterations={n}, seeds=2, statistics='oracle')",
        "E",
        "batchnorm",
    ),
    "gradattack": ("gradattack(iterations={n}, tv=1e-2, statistics='proxy')", "D", "none"),
    "gradattack, exact statistics and labels": (
        "gradattack(iterations={n}, tv=1e-2, statistics='oracle', labels='oracle')",
        "B",
        "labels, batchnorm",
    ),
    "e2egi": ("e2egi(iterations={n}, seeds=2, statistics='proxy')", "E", "none"),
    "hf-gradinv": ("hf-gradinv(iterations={n}, statistics='proxy')", "E", "none"),
    "adversarial-prior": ("adversarial-prior(iterations={n}, tv=1e-2)", "D", "none"),
    "gi-pip": ("gi-pip(iterations={n}, tv=1e-2, epochs=20)", "D", "none"),
    "bayes": ("bayes(iterations={n})", "C", "none"),
    "learning-to-invert": ("learning-to-invert", "D", "none"),
    "hcgla": ("hcgla(iterations={n}, restarts=1)", "D", "none"),
}
# What they are where the network has no BatchNorm; those with its exact statistics are left out.
WITHOUT_BATCHNORM = {
    "see-through-gradients": "see-through-gradients(iterations={n}, seeds=2, batchnorm=0.0)",
    "gradattack": "gradattack(iterations={n}, tv=1e-2)",
    "e2egi": "e2egi(iterations={n}, seeds=2, batchnorm=0.0)",
    "hf-gradinv": "hf-gradinv(iterations={n}, batchnorm=0.0)",
}


@dataclass(frozen=True)
class Cell:
    """A network in a state, and a batch size."""

    network: str
    trained: bool
    batch: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.network}-{'trained' if self.trained else 'untrained'}-{self.batch}"


def stored(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (uint8) and labels of one file of CIFAR-10."""
    folder = os.environ.get("FEDSIM_TEST_DATA")
    if folder is None:
        raise SystemExit("FEDSIM_TEST_DATA names no folder with cifar10/train_1.npz")
    with np.load(Path(folder) / "cifar10" / f"{name}.npz") as file:
        return torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()


def write_data(out: Path, places: Sequence[int], name: str) -> str:
    """Write some training images, test images as surrogate; return the data set's expression."""
    file = (out / f"{name}.safetensors").absolute()
    images, labels = stored("train_1")
    others, theirs = stored("test_1")
    chosen = torch.tensor(places)
    content = {
        "images": images[chosen].contiguous(),
        "labels": labels[chosen].contiguous(),
        "test_images": others.contiguous(),
        "test_labels": theirs.contiguous(),
    }
    save_file(content, file, metadata={"classes": json.dumps([str(c) for c in range(10)])})
    return f"tensors(path='{file}')"


def run(flat: dict[str, Any], out: Path) -> Path:
    """Run a scenario; return its folder."""
    common = {"federation.threads": 1, "federation.timeout": 6000.0, "output.dir": str(out)}
    scenario = Scenario.from_flat({**common, **flat})
    return run_inline(scenario, COMMAND).parent


def captured(cell: Cell, out: Path) -> Path:
    """Return the folder of a run that holds what the server saw in this cell."""
    place = out / "captures" / cell.name
    if place.exists():
        return place.resolve()
    flat = {
        "title": cell.name,
        "threat-model": "B",
        "attack": "inverting-gradients(iterations=1)",
        "model.name": NETWORKS[cell.network],
        "data.dataset": write_data(out, list(PLACES), "twenty"),
        "federation.clients": SIZES[cell.batch],
        "federation.local": f"fedsgd(batch_size={cell.batch}, lr=0.1)",
    }
    if cell.trained:
        flat["model.weights"] = str(trained(cell.network, out))
    folder = run(flat, out)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(folder)
    return folder


def trained(network: str, out: Path) -> Path:
    """Return the folder of a run that trained a network for an epoch."""
    place = out / "trained" / network
    if not place.exists():
        flat = {
            "title": f"train {network}",
            "model.name": NETWORKS[network],
            "model.batchnorm": "shared" if network == "resnet20" else "frozen",
            "data.dataset": write_data(out, range(10_000), "first-file"),
            "federation.clients": 1,
            "federation.local": "fedavg(epochs=1, batch_size=32, lr=0.05)",
        }
        folder = run(flat, out)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(folder)
    return place.resolve()


def attacked(cell: Cell, method: str, iterations: int, out: Path) -> dict[str, Any]:
    """Return how a method did in a cell; from its file, where it was run before."""
    template, letter, oracles = METHODS[method]
    if cell.network != "resnet20":
        template = WITHOUT_BATCHNORM.get(method, template)
    expression = template.format(n=iterations, b=cell.batch)
    told = hashlib.sha256(f"{expression} {letter} {oracles}".encode()).hexdigest()[:12]
    file = out / f"{cell.name}-{told}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    changes = {"threat-model": letter, "oracles": oracles}
    print(f"-- {cell.name}: {expression}", flush=True)
    try:
        folder = attack_again(RunFolder(captured(cell, out)), expression, changes, COMMAND)
        write_report(folder)
        report = json.loads((folder.path / "report.json").read_text())
        result = figures(report)
        shutil.rmtree(folder.path)
    except (ScenarioError, RunFailed, NotGranted) as error:
        return {"refused": getattr(error, "remedy", None) or str(error)}
    file.write_text(json.dumps(result))
    return result


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the table shows of a report."""
    leak = report["leak"]
    if not leak:
        return {"refused": "returned nothing"}
    return {
        "psnr": leak["psnr"]["mean"],
        "best": leak["psnr"]["max"],
        "ssim": leak["ssim"]["mean"],
        "leaked": leak["leaked"],
        "of": leak["private_examples"],
        "labels": leak["label_accuracy"],
        "floor": leak["floor"]["psnr"]["mean"] if leak["floor"] else None,
        "seconds": report["attack"]["seconds"],
        "evaluations": report["attack"]["gradient_evaluations"],
    }


HEAD = """# Attacks on one gradient, side by side

The same 20 CIFAR-10 images for all (training images {places}), the same captures, at most
{iterations} iterations of one start (two seeds where seeds work together): far fewer than the
papers', so that the figures compare methods and say little of what each can reach.  Networks:
{networks}; each untrained and after an epoch on 10,000 training images, BatchNorm in eval mode.
PSNR in [0, 1], matched one to one by the auditor;
"leaked" is PSNR of 20 dB or more; "floor" is the best guess that sees no update.  No LPIPS: its
weights were not at hand.  Seconds are of a machine that did other things too.

`e2egi` reads labels off sums of rows, which needs features that are not negative; `hcgla` is meant
for sparsified gradients; `idlg` and `hcgla` are for one example.

One command: `{command}`.
"""


def page(cells: Sequence[Cell], methods: Sequence[str], iterations: int, out: Path) -> str:
    """Return the page."""
    networks = list(dict.fromkeys(cell.network for cell in cells))
    places = f"{PLACES[0]}, {PLACES[1]}, {PLACES[2]} ... {PLACES[-1]}"
    lines = [
        HEAD.format(
            places=places,
            iterations=iterations,
            networks=", ".join(f"`{NETWORKS[name]}`" for name in networks),
            command=f"{COMMAND} --networks {' '.join(networks)}",
        )
    ]
    for cell in cells:
        fitting = [
            m for m in methods if cell.network == "resnet20" or "batchnorm" not in METHODS[m][2]
        ]
        results = {method: attacked(cell, method, iterations, out) for method in fitting}
        floor = next((r["floor"] for r in results.values() if r.get("floor")), None)
        plain = results.get("inverting-gradients", {}).get("psnr")
        state = "trained" if cell.trained else "untrained"
        title = f"## {cell.network}, {state}, batches of {cell.batch}"
        lines += [f"{title} (floor {floor:.1f} dB)" if floor else title, ""]
        lines += ["| attack | PSNR | beside plain | best | SSIM | leaked | labels | seconds | GE |"]
        lines += ["|" + " --- |" * 9]
        lines += [row(method, found, plain) for method, found in results.items()]
        lines += [""]
    return "\n".join(lines)


def row(method: str, found: dict[str, Any], plain: float | None) -> str:
    """Return one line of a table."""
    if "refused" in found:
        return f"| {method} | refused |" + " |" * 7
    beside = "" if plain is None else f"{found['psnr'] - plain:+.1f}"
    labels = "" if found["labels"] is None else f"{found['labels']:.2f}"
    return (
        f"| {method} | {found['psnr']:.1f} | {beside} | {found['best']:.1f} "
        f"| {found['ssim']:.2f} | {found['leaked']} of {found['of']} | {labels} "
        f"| {found['seconds']:.0f} | {found['evaluations']} |"
    )


def main() -> None:
    """Fill every cell that is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--states", nargs="+", default=["untrained", "trained"])
    parser.add_argument("--out", type=Path, default=Path("runs/passive"))
    parser.add_argument("--page", type=Path, default=Path("docs/methods/passive.md"))
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    given.out.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(network, state == "trained", size)
        for network in given.networks
        for state in given.states
        for size in given.sizes
    ]
    given.page.write_text(page(cells, given.methods, given.iterations, given.out.absolute()))


if __name__ == "__main__":
    main()
