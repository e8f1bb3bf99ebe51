"""Passive attacks, all on the same 20 CIFAR-10 images: docs/methods/passive.md.

    FEDSIM_TEST_DATA=... python tests/benchmarks/passive_table.py [--iterations 300]
        [--methods NAME ...] [--networks lenet resnet20 ...] [--sizes 1 4 8]
        [--states untrained trained] [--finished] [--out runs/passive]
        [--page docs/methods/passive.md]

The images are the training images 0, 500, 1000 ... 9500.  One federation for each network, state
(untrained; trained for an epoch on the first 10,000 training images) and batch size is captured
once, and every attack then works on that capture (``fedsim attack``) with the same iterations.
Batches of 1 and 4 take all 20 images, batches of 8 take 8 of each of two clients' ten.  Finished
cells are kept in ``--out``, one file each, so that the command goes on where it stopped; delete
them when an attack changes.  ``--finished`` draws those and runs nothing.
"""

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_images import cifar

from fedsim.engines.inline import run_inline
from fedsim.errors import NotGranted, RunFailed, ScenarioError
from fedsim.reattack import attack_again
from fedsim.run import write_report
from fedsim.run_folder import RunFolder
from fedsim.scenario import Scenario

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/passive_table.py"
PLACES = range(0, 10_000, 500)
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
    "dlg, ten times as long": ("dlg(batch_size={b}, iterations=3000, restarts=1)", "A", "none"),
    "linear-inversion": ("linear-inversion", "A", "none"),
    "spear": ("spear", "B", "none"),
    "inverting-gradients, labels by sign": (
        "inverting-gradients(iterations={n}, tv=1e-2, labels='idlg')",
        "B",
        "none",
    ),
    "r-gap": ("r-gap", "B", "none"),
    "april": ("april", "B", "none"),
    "peeling": ("peeling", "B", "none"),
    "joint-inversion": (
        "joint-inversion(defense='spn', iterations={n}, restarts=1, tv=1e-2)",
        "C",
        "none",
    ),
    "gradvit": ("gradvit(iterations={n}, tv=2.0, patch=0.2, image=0.02)", "D", "none"),
    "dropout-inversion": ("dropout-inversion(iterations={n}, tv=1e-2)", "B", "none"),
    "rog": ("rog(pairs=32, steps=200)", "D", "none"),
    "mjolnir": (
        "mjolnir(noise=0.02, steps=200, chain='mean', "
        "then='inverting-gradients(iterations={n}, tv=1e-2)')",
        "D",
        "none",
    ),
    "learning-to-invert, told the noise": ("learning-to-invert(noise=0.02)", "D", "none"),
    "bayes, told the noise": (
        "bayes(iterations={n}, defense='gaussian(std=0.02)')",
        "C",
        "none",
    ),
    "temporal-robust": ("temporal-robust(iterations={n}, tv=1e-2)", "B", "none"),
    "inverting-gradients, blindly": (
        "inverting-gradients(iterations={n}, tv=1e-2, labels='fedavg-counts')",
        "C",
        "none",
    ),
    "inverting-gradients, simulated": (
        "inverting-gradients(iterations={n}, tv=1e-2, labels='fedavg-counts', simulate=True)",
        "C",
        "none",
    ),
    "agic": ("agic(iterations={n})", "C", "none"),
    "sme": ("sme(iterations={n})", "C", "none"),
    "fedavg-leakage": ("fedavg-leakage(iterations={n})", "C", "none"),
    "bn-fedavg-inversion": (
        "bn-fedavg-inversion(iterations={n}, tv=1e-2, labels='analytic')",
        "D",
        "none",
    ),
}
# What they are where the network has no BatchNorm; those with its exact statistics are left out.
WITHOUT_BATCHNORM = {
    "see-through-gradients": "see-through-gradients(iterations={n}, seeds=2, batchnorm=0.0)",
    "gradattack": "gradattack(iterations={n}, tv=1e-2)",
    "e2egi": "e2egi(iterations={n}, seeds=2, batchnorm=0.0)",
    "hf-gradinv": "hf-gradinv(iterations={n}, batchnorm=0.0)",
}
ON_ONE_GRADIENT = tuple(METHODS)[: list(METHODS).index("dlg, ten times as long") + 1]
PLAIN = "inverting-gradients"
WITH_STATISTICS = (
    PLAIN,
    "gradattack",
    "gradattack, exact statistics and labels",
    "see-through-gradients, exact statistics",
)


@dataclass(frozen=True)
class Network:
    """A network, how its clients train, and the methods for it; the first is the one to beat.

    ``{b}`` in ``local`` stands for the batch size, ``{half}`` for half of it.
    """

    model: str
    methods: tuple[str, ...] = ON_ONE_GRADIENT
    local: str = "fedsgd(batch_size={b}, lr=0.1)"
    changes: dict[str, Any] = field(default_factory=dict)
    about: str = ""

    @property
    def batchnorm(self) -> bool:
        """Whether it has BatchNorm."""
        return self.model.startswith("resnet") or "norm='batch'" in self.model


CONVNET = "convnet(stride=2)"
NETWORKS = {
    "lenet-tanh": Network("lenet(activation='tanh', init='default')"),
    "lenet": Network("lenet"),
    "batchnorm": Network(
        "convnet(stride=2, norm='batch')",
        (*WITH_STATISTICS, "see-through-gradients", "e2egi", "hf-gradinv"),
        about="with BatchNorm, in eval mode",
    ),
    "resnet20": Network("resnet20(width=8)"),
    "resnet18": Network("resnet18", WITH_STATISTICS, about="with the stem for small images"),
    "mlp": Network(
        "mlp(hidden=[400], normalize=True)",
        (PLAIN, "linear-inversion", "spear", "peeling"),
        about="exact",
    ),
    "cnn6": Network(
        "cnn6",
        ("inverting-gradients, labels by sign", "r-gap"),
        changes={"federation.precision": "float64"},
        about="float64, no biases; `r-gap` is exact, for one image",
    ),
    "vit": Network(
        "vit",
        (PLAIN, "april", "gradvit"),
        changes={"federation.precision": "float64"},
        about="float64; `april` is exact, for one image",
    ),
    "dropout": Network(
        "convnet(stride=2, dropout=0.5)",
        (PLAIN, "dropout-inversion"),
        changes={"model.batchnorm": "private"},
        about="clients draw masks of their own",
    ),
    "pruned": Network(
        CONVNET,
        (PLAIN, "rog", "hcgla", "learning-to-invert"),
        changes={"defenses": "prune(ratio=0.9)"},
        about="uploads `prune(ratio=0.9)`",
    ),
    "noised": Network(
        CONVNET,
        (PLAIN, "mjolnir", "bayes, told the noise", "learning-to-invert, told the noise"),
        changes={"defenses": "gaussian(std=0.02)"},
        about="uploads `gaussian(std=0.02)`",
    ),
    "private": Network(
        CONVNET,
        (PLAIN, "joint-inversion"),
        changes={"defenses": "spn"},
        about="clients keep a branch of the network to themselves (`spn`)",
    ),
    "rounds": Network(
        CONVNET,
        (PLAIN, "temporal-robust"),
        changes={"federation.rounds": 4},
        about="four rounds of the same images; plain: the best of four candidates counts",
    ),
    "fedavg": Network(
        CONVNET,
        (
            "inverting-gradients, blindly",
            "agic",
            "sme",
            "inverting-gradients, simulated",
            "fedavg-leakage",
        ),
        local="fedavg(epochs=2, batch_size={half}, lr=0.01)",
        about="two local epochs, two steps each where there is more than one image",
    ),
    "fedavg-batchnorm": Network(
        "convnet(stride=2, norm='batch')",
        (PLAIN, "bn-fedavg-inversion"),
        local="fedavg(epochs=1, batch_size={b}, lr=0.01)",
        changes={"model.batchnorm": "shared"},
        about="one local step, BatchNorm's statistics are uploaded",
    ),
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
    network, clients = NETWORKS[cell.network], SIZES[cell.batch]
    first, letter, _ = METHODS[network.methods[0]]
    flat = {
        "title": cell.name,
        "threat-model": letter,
        "attack": first.format(n=1, b=cell.batch),
        "model.name": network.model,
        "data.dataset": cifar(out, PLACES, "twenty"),
        "federation.clients": clients,
        "federation.local": network.local.format(b=cell.batch, half=max(1, cell.batch // 2)),
        **network.changes,
    }
    if network.local != Network.local or "federation.rounds" in network.changes:
        flat["data.partition"] = f"size(partition_sizes={[cell.batch] * clients})"
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
            "model.name": NETWORKS[network].model,
            "model.batchnorm": "shared" if NETWORKS[network].batchnorm else "frozen",
            "data.dataset": cifar(out, range(10_000), "first-file"),
            "federation.clients": 1,
            "federation.local": "fedavg(epochs=1, batch_size=32, lr=0.05)",
        }
        folder = run(flat, out)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(folder)
    return place.resolve()


def attacked(
    cell: Cell, method: str, iterations: int, out: Path, *, finished: bool
) -> dict[str, Any] | None:
    """Return how a method did in a cell; from its file, where it was run before."""
    template, letter, oracles = METHODS[method]
    if not NETWORKS[cell.network].batchnorm:
        template = WITHOUT_BATCHNORM.get(method, template)
    expression = template.format(n=iterations, b=cell.batch)
    told = hashlib.sha256(f"{expression} {letter} {oracles}".encode()).hexdigest()[:12]
    file = out / f"{cell.name}-{told}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    if finished:
        return None
    changes = {"threat-model": letter, "oracles": oracles}
    print(f"-- {cell.name}: {expression}", flush=True)
    try:
        folder = attack_again(RunFolder(captured(cell, out)), expression, changes, COMMAND)
        write_report(folder)
        report = json.loads((folder.path / "report.json").read_text())
        result = figures(report)
        shutil.rmtree(folder.path)
    except RunFailed as error:
        print(f"-- {cell.name}: {method} failed: {error}", flush=True)
        return {"refused": str(error)}
    except (ScenarioError, NotGranted) as error:
        result = {"refused": getattr(error, "remedy", None) or str(error)}
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


HEAD = """# Passive attacks, side by side

CIFAR-10's training images {places}, dealt out alike in every cell: all 20 in batches of 1 and 4,
16 of them in batches of 8 (other ones of them in `rounds` and `fedavg`). Every method of a cell
works on the same captures, with at most {iterations} iterations of one start unless the name says
otherwise (two seeds where seeds work together): far fewer than the papers', so that the figures
compare methods and say little of what each can reach. Each network untrained and after an epoch
on 10,000 training images (`dropout` without dropping anything then); clients compute gradients
with BatchNorm and dropout in eval mode, but for `dropout` and `fedavg-batchnorm`. PSNR in [0, 1],
matched one to one by the auditor; "leaked" is PSNR of 20 dB or more; "floor" is the best guess
that sees no update; "GE" are gradient evaluations. No LPIPS: its weights were not at hand.
One seed. Seconds are of a machine that did other things too.

What is below the floor leaked nothing that a mean image does not. Reasons that the methods
themselves give, not measured here one by one: `dlg`'s squared distance is ruled by the layers
with the largest gradients, and L-BFGS wants more than 300 steps; `see-through-gradients` adds
noise to pixels after every step, and at its published weights the gradient hardly counts ([a
thousand times as heavy](side-by-side.md) it finds images); `bayes` weighs by noise that nobody
added, where it is not told of any; `learning-to-invert` is one pass of a network trained on 1,000
gradients; `e2egi` reads labels off sums of rows, which needs features that are not negative;
`hcgla` is meant for sparsified gradients; `idlg`, `hcgla`, `r-gap` and `april` are for one
example, and refuse more. [`gradvit`](gradvit.md), [`hf-gradinv`](hf-gradinv.md),
[`gi-pip`](gi-pip.md), [`fedavg-leakage`](fedavg-leakage.md), and
[`bn-fedavg-inversion`](bn-fedavg-inversion.md) say on their pages where they stay behind, and
[`gradattack`](gradattack.md) what statistics are worth.

One command: `{command}`. Rows are of several commits: cells are kept, and run again where an
attack changes. Those that are missing were not run: of `resnet20` all batches above one, and of
`resnet18`, of which an iteration of 20 images takes 4 s on an idle core, all but
`inverting-gradients` and the cells that are there.
"""


def page(
    cells: Sequence[Cell], methods: Sequence[str], iterations: int, out: Path, *, finished: bool
) -> str:
    """Return the page."""
    places = f"{PLACES[0]}, {PLACES[1]}, {PLACES[2]} ... {PLACES[-1]}"
    head = HEAD.format(places=places, iterations=iterations, command=COMMAND)
    tables, found = [], dict[Cell, dict[str, dict[str, Any]]]()
    for cell in cells:
        fitting = [m for m in NETWORKS[cell.network].methods if m in methods]
        if not NETWORKS[cell.network].batchnorm:
            fitting = [m for m in fitting if "batchnorm" not in METHODS[m][2]]
        tried = {m: attacked(cell, m, iterations, out, finished=finished) for m in fitting}
        results = {method: one for method, one in tried.items() if one}
        if results:
            found[cell] = results
            tables += table(cell, results)
    return "\n".join([head, *summary(found), *tables])


def summary(found: dict[Cell, dict[str, dict[str, Any]]]) -> list[str]:
    """Return the lines of one table of mean PSNR, a row for each network and method."""
    columns = [(trained, size) for trained in (False, True) for size in SIZES]
    names = [f"{'trained' if trained else 'untrained'}, {size}" for trained, size in columns]
    plain = (one.get(NETWORKS[cell.network].methods[0], {}) for cell, one in found.items())
    floors = [one["floor"] for one in plain if one.get("floor")]
    told = f" (floor {min(floors):.1f} to {max(floors):.1f} dB)" if floors else ""
    lines = [f"## Mean PSNR of all, by batch size{told}", ""]
    lines += [f"| network | attack | {' | '.join(names)} |", "|" + " --- |" * (2 + len(names))]
    for network in dict.fromkeys(cell.network for cell in found):
        cells = [found.get(Cell(network, *column), {}) for column in columns]
        for method in dict.fromkeys(method for results in cells for method in results):
            figures = (results.get(method, {}).get("psnr") for results in cells)
            values = ("" if figure is None else f"{figure:.1f}" for figure in figures)
            lines.append(f"| {network} | {method} | {' | '.join(values)} |")
    return [*lines, ""]


def table(cell: Cell, results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of one cell."""
    network = NETWORKS[cell.network]
    floor = next((r["floor"] for r in results.values() if r.get("floor")), None)
    plain = results.get(network.methods[0], {}).get("psnr")
    state = "trained" if cell.trained else "untrained"
    title = f"## {cell.network}, {state}, batches of {cell.batch}"
    return [
        f"{title} (floor {floor:.1f} dB)" if floor else title,
        "",
        f"`{network.model}`{f': {network.about}' if network.about else ''}.",
        "",
        "| attack | PSNR | beside plain | best | SSIM | leaked | labels | seconds | GE |",
        "|" + " --- |" * 9,
        *(row(method, found, plain) for method, found in results.items()),
        "",
    ]


def row(method: str, found: dict[str, Any], plain: float | None) -> str:
    """Return one line of a table."""
    if "refused" in found:
        reason = found["refused"].split(";")[0].replace("|", "\\|")
        return f"| {method} | refused: {reason} |" + " |" * 7
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
    parser.add_argument("--finished", action="store_true")
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
    out = given.out.absolute()
    given.page.write_text(
        page(cells, given.methods, given.iterations, out, finished=given.finished)
    )


if __name__ == "__main__":
    main()
