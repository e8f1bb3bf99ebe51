"""The ``fedsim`` command: thin over the same code as ``flwr run``."""

import logging
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedsim.scenario import Scenario

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Engine(StrEnum):
    """Where clients run."""

    INLINE = "inline"
    SIMULATION = "simulation"


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change keys in place.")
]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="A scenario file, or a folder of them.")],
    overrides: Overrides = None,
    engine: Annotated[Engine, typer.Option(help="Where clients run.")] = Engine.INLINE,
) -> None:
    """Run a scenario; the last line printed is the report's path.

    Of a folder every scenario is run, in the order of their names, and a table compares them.
    """
    if not file.is_dir():
        print(_run(file, overrides, engine))
        return
    from fedsim.series import run_series

    print(run_series(file, lambda one, keys: _run(one, keys, engine), overrides or []))


def _run(file: Path, overrides: list[str] | None, engine: Engine) -> Path:
    """Run one scenario; return the report's path."""
    from fedsim.isolation import start

    scenario = _scenario(file, overrides)
    command = shlex.join(["fedsim", *sys.argv[1:]])
    if engine is Engine.INLINE and scenario.attack not in ("", "none"):
        start.SERVER.start()
    if engine is Engine.SIMULATION:
        from fedsim.engines.simulation import run_simulation

        return run_simulation(scenario, command)
    from fedsim.engines.inline import run_inline

    logging.getLogger("flwr").setLevel(logging.ERROR)  # the range tells its own progress
    return run_inline(scenario, command, lambda path: print(f"run folder: {path}", flush=True))


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A scenario file.")], overrides: Overrides = None
) -> None:
    """Check a scenario whole, and run nothing."""
    from fedsim.parts import Parts, check, check_writable
    from fedsim.run_folder import output_dir

    scenario = _scenario(file, overrides)
    check_writable(output_dir(scenario))
    check(Parts(scenario))
    print(f"{file}: a valid scenario")


@app.command()
def fix(
    file: Annotated[Path, typer.Argument(help="A scenario file.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the whole scenario, so changed, to this file.")
    ] = None,
) -> None:
    """Say what to change so that a scenario's defenses can act on its model."""
    from fedsim.files import write_atomically
    from fedsim.fixing import fixes
    from fedsim.parts import Parts, check

    scenario = _scenario(file, overrides)
    changed = fixes(scenario)
    fixed = scenario.with_changes(**changed)
    check(Parts(fixed))
    for key, value in changed.items():
        print(shlex.quote(f'{key}="{value}"'))
    if not changed:
        print(f"{file}: nothing to fix")
    elif out is not None:
        write_atomically(out, fixed.to_toml())


@app.command()
def attack(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    expression: Annotated[
        str, typer.Argument(metavar="EXPRESSION", help="Another attack on its saved views.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Change threat-model, oracles or audit.criterion."
        ),
    ] = None,
) -> None:
    """Try another attack on the views that a run saved; the run's own report stays."""
    from fedsim.isolation import start

    start.SERVER.start()
    from fedsim.reattack import attack_again
    from fedsim.run import write_report
    from fedsim.run_folder import RunFolder

    command = shlex.join(["fedsim", *sys.argv[1:]])
    run_folder = RunFolder.open(folder)
    print(write_report(attack_again(run_folder, expression, _changes(overrides), command)))


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Finish a run whose reconstruction or report was cut off, from what its attack kept."""
    from fedsim.isolation import start

    start.SERVER.start()
    from fedsim.resume import resume as finish
    from fedsim.run_folder import RunFolder

    print(finish(RunFolder.open(folder)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    vault: Annotated[
        list[Path] | None, typer.Option(help="A SuperNode's vault, given to the auditor now.")
    ] = None,
) -> None:
    """Judge a run again, with the vaults of a cluster's SuperNodes if need be."""
    from fedsim.audit.vault import collect
    from fedsim.run import write_report
    from fedsim.run_folder import RunFolder

    run_folder = RunFolder.open(folder)
    run_folder.gather_vault()
    if vault:
        collect([path.resolve() for path in vault], run_folder.path / "vault")
    print(write_report(run_folder))


@app.command()
def partition(
    file: Annotated[Path, typer.Argument(help="A scenario file.")],
    out: Annotated[Path, typer.Option(help="Folder for one .safetensors file a client.")],
    overrides: Overrides = None,
) -> None:
    """Write each client's own data to a file, for SuperNodes that hold nothing else."""
    from fedsim.data.tensors import save_tensors
    from fedsim.parts import Parts, check_writable

    parts = Parts(_scenario(file, overrides))
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    for client, indices in enumerate(parts.partitions):
        path = out.absolute() / f"client-{client}.safetensors"
        save_tensors(path, parts.dataset.train.subset(indices), parts.dataset.classes)
        print(path)


class Listed(StrEnum):
    """What can be listed."""

    ATTACKS = "attacks"
    DEFENSES = "defenses"
    DATASETS = "datasets"
    MODELS = "models"
    CHANNELS = "channels"
    STRATEGIES = "strategies"
    PARTITIONERS = "partitioners"
    SCENARIOS = "scenarios"


@app.command("list")
def list_(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Only of this family (analytic), threat model (G), or with this text."),
    ] = None,
) -> None:
    """List what there is: name, least threat model, family, what it is, and paper."""
    from fedsim import catalog

    for entry in catalog.entries(what.value, words or []):
        print(entry)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="A name from `fedsim list`, or an expression.")],
) -> None:
    """Explain a method or what else a scenario names: paper, threat model, parameters, figures."""
    from fedsim import catalog

    print(catalog.explain(name))


def _scenario(file: Path, overrides: list[str] | None) -> "Scenario":
    """Read a scenario; relative ``output.dir`` and ``model.weights`` mean the caller's folder.

    Where weights are named by a link (``runs/latest``) the run remembers what it led to.
    """
    from fedsim.scenario import Scenario

    scenario = Scenario.load(file, _changes(overrides))
    paths = {"output.dir": Path(scenario.output.dir).expanduser().absolute()}
    if scenario.model.weights != "none":
        paths["model.weights"] = Path(scenario.model.weights).expanduser().resolve()
    return scenario.with_changes(**{key: str(path) for key, path in paths.items()})


def _changes(overrides: list[str] | None) -> dict[str, Any]:
    from fedsim.scenario import parse_override

    return {k: v for text in overrides or [] for k, v in parse_override(text).items()}


def main() -> None:
    """Run the command; a refusal or a failed run is one message and a non-zero exit status."""
    from fedsim.errors import NotGranted, RunFailed, ScenarioError

    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        app()
    except (ScenarioError, RunFailed, NotGranted) as error:
        print(f"fedsim: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ScenarioError) else 1)
