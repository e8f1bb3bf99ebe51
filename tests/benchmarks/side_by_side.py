"""Our attacks beside ``breaching``'s: the same problems, in one process, in turns.

    git clone https://github.com/JonasGeiping/breaching PATH
    git -C PATH checkout 8bd99d52cdb8c38d6b12a191e620d11d275a8d45
    pip install hydra-core
    python tests/benchmarks/side_by_side.py --breaching PATH [--cases ig-1 ...] [--turns 9]

Both sides get the same images, network, weights, gradients, labels, starting points and number of
iterations, and each runs by its own entry point: ``Attack.reconstruct`` and
``attacker.reconstruct``.  Printed are PSNR in [0, 1], the mean over images, those of a batch
assigned one to one on MSE, and milliseconds per target and iteration: medians over turns, in which
either side begins alternately, and the median of the turns' ratios.

Where the two differ by design:
- theirs counts in its total variation the step from the last row and column to the zeros beyond,
  ours does not; the weights make all other steps count the same.  Cases ``-flat`` have none.
- theirs keeps the candidate one step after the lowest objective, ours the one that had it.
- L-BFGS: theirs halves the squared distance (``scale=2`` takes that back), and ends a step of 20
  evaluations early where nothing moves; ours gets as many evaluations as theirs may have.
- See-through-gradients: theirs matches gradients by half the square of one norm, ours by a norm for
  each parameter, as the paper does; theirs means the square of pixels, ours takes their norm.  Both
  without noise and group; BatchNorm's layers all count the same.
"""

import argparse
import importlib
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.attack import Attack
from fedsim.data import DataSpec, Split, load_dataset
from fedsim.models import initial_model, travelling
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.optimization.basic.dlg import DLG
from strategies.attacks.optimization.basic.inverting_gradients import InvertingGradients
from strategies.attacks.optimization.basic.see_through_gradients import SeeThroughGradients

COMMIT = "8bd99d52cdb8c38d6b12a191e620d11d275a8d45"
HOW = (
    "git clone https://github.com/JonasGeiping/breaching PATH && "
    f"git -C PATH checkout {COMMIT} && pip install hydra-core"
)
# Of breaching's invertinggradients.yaml; it divides by all 32 rows, we by the 31 steps between.
THEIR_TV, STEPS = 0.2, 31 / 32
# One step of torch.optim.LBFGS is so many evaluations.
EVALUATIONS = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """What both sides run.

    Attributes
    ----------
    ours : callable
        Our attack, from iterations and restarts.
    theirs : str
        Their configuration.
    overrides : callable
        What is changed in it, from iterations.
    expression : str
        The network.
    targets : int
        Captures of ``batch_size`` images each.
    together : bool
        Whether ours gets all targets in one call.
    restarts : int
    standardized : bool
        Whether what is searched are standardized pixels.
    threat_model : str
    labels_known : bool
        Whether both are told the labels, or search them too.
    iterations : int
        For PSNR.
    timed : int
        Iterations of one turn.
    """

    ours: Callable[[int, int], Attack]
    theirs: str
    overrides: Callable[[int], list[str]]
    expression: str = "lenet"
    targets: int = 8
    batch_size: int = 1
    together: bool = False
    restarts: int = 1
    standardized: bool = True
    threat_model: str = "B"
    labels_known: bool = True
    iterations: int = 500
    timed: int = 100


def _ig(tv: float, **settings: Any) -> Case:
    """Return a case of Inverting Gradients with so much total variation."""
    return Case(
        ours=lambda iterations, restarts: InvertingGradients(
            iterations=iterations, restarts=restarts, tv=tv * STEPS, labels="oracle"
        ),
        theirs="invertinggradients",
        overrides=lambda iterations: [
            f"optim.max_iterations={iterations}",
            f"regularization.total_variation.scale={tv}",
        ],
        **settings,
    )


def _dlg(**settings: Any) -> Case:
    """Return a case of DLG."""
    return Case(
        ours=lambda iterations, restarts: DLG(
            iterations=iterations, restarts=restarts, patience=iterations + 1
        ),
        theirs="deepleakage",
        overrides=lambda iterations: [
            f"optim.max_iterations={iterations // EVALUATIONS}",
            "objective.scale=2.0",
        ],
        standardized=False,
        threat_model="A",
        labels_known=False,
        **settings,
    )


def _stg(strength: float = 1.0, **settings: Any) -> Case:
    """Return a case of See-through-gradients: one seed, no noise, no group.

    ``strength`` times the weight of the gradients' distance that either side's settings have.
    """
    return Case(
        ours=lambda iterations, restarts: SeeThroughGradients(
            iterations=iterations,
            seeds=restarts,
            gradient=1e-3 * strength,
            tv=1e-4 * STEPS,
            group=0,
            noise=0,
            labels="oracle",
        ),
        theirs="seethroughgradients",
        overrides=lambda iterations: [
            f"optim.max_iterations={iterations}",
            "optim.langevin_noise=0",
            f"objective.scale={1e-4 * strength}",
            "+regularization.deep_inversion.first_bn_multiplier=1",
        ],
        threat_model="E",
        **{"expression": "convnet(stride=2, norm='batch')", "iterations": 300, **settings},
    )


WIDE = "convnet(norm='batch')"
CASES: dict[str, Case] = {
    "ig-1": _ig(THEIR_TV),
    "ig-1-flat": _ig(0.0),
    "ig-4": _ig(THEIR_TV, batch_size=4, targets=4),
    "ig-16-targets": _ig(THEIR_TV, targets=16, together=True, timed=25),
    "ig-16-restarts": _ig(
        THEIR_TV, targets=1, together=True, restarts=16, timed=25, iterations=300
    ),
    "dlg-1": _dlg(iterations=1000),
    "dlg-16-targets": _dlg(targets=16, together=True, iterations=1000, timed=40),
    "stg-1": _stg(targets=8),
    "stg-1-strong": _stg(1000.0, targets=8, iterations=1500),
    "stg-16-targets": _stg(targets=16, together=True, timed=60),
    "stg-1-wide": _stg(targets=4, expression=WIDE),
    "stg-16-wide": _stg(targets=16, together=True, expression=WIDE, timed=60),
}


class Noting(Knowledge):
    """Knowledge that notes which starting points were drawn."""

    def generator(self, *names: object) -> torch.Generator:
        """Return the generator of this name."""
        if "start" in names:
            self.asked = [*getattr(self, "asked", []), names]
        return super().generator(*names)

    def starts(self, size: int) -> list[Tensor]:
        """Draw again what was drawn, ``[n]`` each."""
        return [torch.randn(size, generator=super(Noting, self).generator(*n)) for n in self.asked]


class Problem:
    """The captures of one case: images ``[T, B, C, H, W]``, labels ``[T, B]``, gradients."""

    def __init__(self, case: Case) -> None:
        self.case = case
        train = load_dataset("photo-tiles").train
        self.spec = load_dataset("photo-tiles").spec
        self.network = initial_model(case.expression, self.spec, 0)
        self._pass(train)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        chosen = order[self._distinct(train.batch(order)[1])]
        images, labels = train.batch(chosen.flatten())
        self.images = images.view(*chosen.shape, *self.spec.shape)
        self.labels = labels.view(chosen.shape)
        sent = {name: tensor.clone() for name, tensor in travelling(self.network).items()}
        names = [name for name, _ in self.network.named_parameters()]
        self.gradients = [
            gradient_of(self.network, *batch)
            for batch in zip(self.images, self.labels, strict=True)
        ]
        self.views = [
            ServerView(
                1, (i,), case.expression, sent, dict(zip(names, tensors, strict=True)), "gradient"
            )
            for i, tensors in enumerate(self.gradients)
        ]

    def _pass(self, train: Split) -> None:
        """Let BatchNorm see 32 batches of 32 images, and freeze its statistics."""
        with torch.no_grad():
            for first in range(0, 1024, 32):
                self.network.train()(train.batch(torch.arange(first, first + 32))[0])
        self.network.eval()

    def _distinct(self, labels: Tensor) -> Tensor:
        """Pick images ``[T, B]`` in order, such that no batch has a label twice."""
        rows: list[dict[int, int]] = [{} for _ in range(self.case.targets)]
        for place, label in enumerate(labels.tolist()):
            for row in rows:
                if len(row) < self.case.batch_size and label not in row:
                    row[label] = place
                    break
        return torch.tensor([list(row.values()) for row in rows])

    def knowledge(self) -> Noting:
        """What ours is told: true labels too, as an oracle, for theirs is told them."""
        labels = {view.label: row for view, row in zip(self.views, self.labels, strict=True)}
        return Noting(
            self.case.threat_model,
            data=self.spec,
            training=None,
            seed=11,
            device=torch.device("cpu"),
            oracles={"labels": lambda view: labels[view.label]},
            num_examples=dict.fromkeys(labels, self.case.batch_size),
        )

    def psnr(self, found: Tensor) -> float:
        """Return the mean PSNR in dB over all images, for ``[T, B, C, H, W]``."""
        figures = []
        for pair in zip(self.images, found, strict=True):
            truth, batch = (images.double().clamp(0, 1).flatten(1) for images in pair)
            mse = torch.cdist(truth, batch).square() / truth.shape[1]
            rows, columns = linear_sum_assignment(mse.numpy())
            figures.append(-10 * mse[rows, columns].log10())
        return torch.cat(figures).mean().item()


def gradient_of(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return the gradient of the mean cross-entropy."""
    return torch.autograd.grad(cross_entropy(network(images), labels), list(network.parameters()))


def run_ours(problem: Problem, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """Run our attack; return images ``[T, B, C, H, W]`` and where each search began, ``[n]``."""
    case, knowledge, found = problem.case, problem.knowledge(), []
    attack = case.ours(iterations, case.restarts)
    calls = [problem.views] if case.together else [[view] for view in problem.views]
    for views in calls:
        found.append(attack.reconstruct(views, knowledge).examples)
    size = case.batch_size * (
        prod(problem.spec.shape) + (0 if case.labels_known else problem.spec.num_classes)
    )
    return torch.cat(found).view_as(problem.images), knowledge.starts(size)


class Standardized(nn.Module):
    """A network of ours for images that are standardized already, as breaching's are."""

    def __init__(self, network: nn.Module, spec: DataSpec) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = (torch.tensor(v).view(-1, 1, 1) for v in (spec.mean, spec.std))

    def forward(self, standardized: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to logits."""
        logits: Tensor = self.network(torch.addcmul(self.mean, standardized, self.std))
        return logits


class Metadata(dict[str, object]):
    """What breaching reads as attributes here and as items there."""

    def __getattr__(self, name: str) -> object:
        """Return an item."""
        return self[name]


class Peer:
    """breaching's attack on the same problem."""

    def __init__(self, breaching: Any, problem: Problem) -> None:
        self.breaching, self.problem = breaching, problem
        spec, standardized = problem.spec, problem.case.standardized
        self.network = Standardized(problem.network, spec) if standardized else problem.network
        channels = len(spec.mean)
        self.metadata = Metadata(
            shape=spec.shape,
            classes=spec.num_classes,
            modality="vision",
            task="classification",
            mean=spec.mean if standardized else (0.0,) * channels,
            std=spec.std if standardized else (1.0,) * channels,
        )
        for images, labels, expected in zip(
            problem.images, problem.labels, problem.gradients, strict=True
        ):
            theirs = gradient_of(self.network, self.standardize(images), labels)
            for one, other in zip(theirs, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    def standardize(self, images: Tensor) -> Tensor:
        """Return what their network wants to see."""
        mean, std = (
            torch.tensor(v).view(-1, 1, 1) for v in (self.metadata.mean, self.metadata.std)
        )
        return (images - mean) / std

    def attacker(self, iterations: int, starts: Sequence[Tensor]) -> Any:
        """Build their attack, which takes its starting points from ``starts`` in order."""
        case, shape = self.problem.case, self.problem.spec.shape
        overrides = [*case.overrides(iterations), f"restarts.num_trials={case.restarts}"]
        with redirect_stdout(StringIO()):
            config = self.breaching.get_attack_config(case.theirs, overrides)
        setup = {"device": torch.device("cpu"), "dtype": torch.float}
        attacker = self.breaching.attacks.prepare_attack(
            self.network, nn.CrossEntropyLoss(), config, setup
        )
        pixels = case.batch_size * prod(shape)
        drawn = {True: iter(starts), False: iter([starts[0], *starts])}

        def start(wanted: Sequence[int]) -> Tensor:
            image = tuple(wanted[1:]) == tuple(shape)  # else logits of labels, asked for once more
            flat = next(drawn[image])
            part = flat[:pixels] if image else flat[pixels:]
            return part.view(*wanted).clone().requires_grad_()

        attacker._initialize_data = start
        return attacker

    def run(self, iterations: int, starts: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Run their attack on one target after another; return images and evaluations."""
        case, found, evaluations = self.problem.case, [], 0

        def count(*_: object) -> None:
            nonlocal evaluations
            evaluations += 1

        for i, gradients in enumerate(self.problem.gradients):
            some = starts[i * case.restarts : (i + 1) * case.restarts]
            attacker = self.attacker(iterations, some)
            attacker.objective.register_forward_hook(count)
            metadata = {
                "num_data_points": case.batch_size,
                "labels": self.problem.labels[i] if case.labels_known else None,
                "local_hyperparams": None,
            }
            payload = {
                "parameters": list(self.network.parameters()),
                "buffers": list(self.network.buffers()),
                "metadata": self.metadata,
            }
            shared = {"gradients": gradients, "buffers": None, "metadata": metadata}
            data, _ = attacker.reconstruct([payload], [shared], {})
            found.append(data["data"])
        mean, std = (
            torch.tensor(v).view(-1, 1, 1) for v in (self.metadata.mean, self.metadata.std)
        )
        return torch.stack(found).detach() * std + mean, evaluations


def quality(case: Case, breaching: Any) -> str:
    """Run both to the end, and say how near they came."""
    problem = Problem(case)
    ours, starts = run_ours(problem, case.iterations)
    theirs, evaluations = Peer(breaching, problem).run(case.iterations, starts)
    one, other = problem.psnr(ours), problem.psnr(theirs)
    return (
        f"PSNR {one:6.2f} dB ours {other:6.2f} theirs ({one - other:+.2f}), "
        f"{problem.labels.numel()} images, {case.iterations} iterations, theirs made "
        f"{evaluations / case.targets / case.restarts:.0f} evaluations"
    )


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def speed(case: Case, breaching: Any, turns: int) -> str:
    """Let both run short in turns, and say how long an iteration takes."""
    problem = Problem(case if case.together else replace(case, targets=2))
    peer = Peer(breaching, problem)
    _, starts = run_ours(problem, EVALUATIONS)
    searches = problem.case.targets * case.restarts
    # theirs may end early: ours makes as many evaluations as it did
    evaluations = peer.run(case.timed, starts)[1]
    iterations = round(evaluations / searches)
    runs: list[Callable[[], object]] = [
        lambda: run_ours(problem, iterations),
        lambda: peer.run(case.timed, starts),
    ]
    counts = searches * iterations, evaluations
    figures: list[list[tuple[float, float]]] = [[], []]
    for turn in range(turns):
        for side in (0, 1) if turn % 2 else (1, 0):
            wall, cpu = clocked(runs[side])
            figures[side].append((wall / counts[side], cpu / counts[side]))
    text = []
    for clock, name in enumerate(("wall", "CPU")):
        ours, theirs = ([turn[clock] for turn in side] for side in figures)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        text.append(
            f"{name} {statistics.median(ours):6.2f} ms ours {statistics.median(theirs):6.2f} "
            f"theirs, {ratio:5.2f} x"
        )
    return "; ".join(text)


def load(path: Path) -> Any:
    """Import breaching from a checkout.

    Raises
    ------
    SystemExit
        If it is not there, or needs what is not installed.
    """
    if not (path / "breaching" / "attacks").is_dir():
        raise SystemExit(f"{path} is no checkout of breaching; get one: {HOW}")
    sys.path.insert(0, str(path))
    warnings.simplefilter("ignore")
    logging.getLogger("breaching").setLevel(logging.WARNING)
    try:
        return importlib.import_module("breaching")
    except ModuleNotFoundError as missing:
        raise SystemExit(f"breaching needs {missing.name}; get both: {HOW}") from missing


def main() -> None:
    """Compare each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--breaching", type=Path, required=True, help=HOW)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["speed", "quality"])
    arguments = parser.parse_args()
    breaching = load(arguments.breaching)
    torch.set_num_threads(arguments.threads)
    for name in arguments.cases:
        if arguments.only != "quality":
            print(f"{name:16s} {speed(CASES[name], breaching, arguments.turns)}", flush=True)
        if arguments.only != "speed":
            print(f"{name:16s} {quality(CASES[name], breaching)}", flush=True)


if __name__ == "__main__":
    main()
