"""What a federated round costs over a plain PyTorch loop on the same batches.

    python tests/benchmarks/round_overhead.py [--engine inline|simulation] [--model convnet]

Prints seconds a round (median of the rounds after the first) and the ratio to a plain loop that
takes the same steps for the same clients in the same process, without any federation around it.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fedsim.models import load_arrays, travelling
from fedsim.parts import Parts
from fedsim.scenario import Scenario

CLIENTS, ROUNDS, TURNS = 8, 6, 3
LOCAL = "fedavg(epochs=1, batch_size=32, lr=0.02)"


def scenario(model: str, out: str) -> Scenario:
    return Scenario.from_flat(
        {
            "title": "round overhead",
            "federation.clients": CLIENTS,
            "federation.rounds": ROUNDS,
            "federation.threads": 1,
            "federation.local": LOCAL,
            "model.name": model,
            "output.dir": out,
        }
    )


def plain_rounds(parts: Parts) -> list[float]:
    """Train each client in turn from the same weights and average, with nothing else around."""
    model = parts.model()
    start = {name: tensor.clone() for name, tensor in travelling(model).items()}
    seconds = []
    for server_round in range(ROUNDS):
        started = time.perf_counter()
        total = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for client, indices in enumerate(parts.partitions):
            load_arrays(model, start)
            split = parts.dataset.train.subset(indices)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            order = torch.randperm(
                len(split), generator=torch.Generator().manual_seed(server_round * 1000 + client)
            )
            for batch in order.split(32):
                images, labels = split.batch(batch)
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()
            for name, tensor in travelling(model).items():
                total[name] += tensor * (len(split) / len(parts.dataset.train))
        start = total
        seconds.append(time.perf_counter() - started)
    return seconds


def federated_rounds(engine: str, model: str) -> list[float]:
    """Run the scenario and return what the report says of its rounds."""
    with tempfile.TemporaryDirectory() as out:
        chosen = scenario(model, out)
        if engine == "simulation":
            from fedsim.engines.simulation import run_simulation

            page = run_simulation(chosen, "benchmark")
        else:
            from fedsim.engines.inline import run_inline

            logging.getLogger("flwr").setLevel(logging.ERROR)
            page = run_inline(chosen, "benchmark")
        report = json.loads((Path(page).parent / "report.json").read_text())
    seconds: list[float] = report["federation"]["round_seconds"]
    return seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--engine", choices=("inline", "simulation"), default="inline")
    arguments.add_argument("--model", default="convnet")
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    parts = Parts(scenario(chosen.model, "runs"))
    plain: list[float] = []
    federated: list[float] = []
    for _ in range(TURNS):  # in turn, so that a machine that slows down slows both
        plain += plain_rounds(parts)[1:]
        first, *later = federated_rounds(chosen.engine, chosen.model)
        federated += later
    print(f"{chosen.model}, {CLIENTS} clients, {LOCAL}, one thread")
    for name, seconds in (("plain PyTorch loop", plain), (chosen.engine, federated)):
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        print(f"{name:20}{statistics.median(seconds):8.3f} s a round ({spread})")
    print(f"{'its first round':20}{first:8.3f} s")
    ratio = statistics.median(federated) / statistics.median(plain)
    print(f"{'ratio of medians':20}{ratio:8.2f}")


if __name__ == "__main__":
    main()
