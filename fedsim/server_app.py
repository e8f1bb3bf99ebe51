"""The ServerApp: the whole walk of a run, on whatever grid Flower gives it."""

import os

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check, check_writable
from fedsim.run import run
from fedsim.run_folder import RunFolder, output_dir
from fedsim.scenario import Scenario

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check and run the scenario in ``context.run_config``; the last line is the report's path."""
    engine = "simulation" if type(grid).__name__ == "InMemoryGrid" else "cluster"
    command = os.environ.get("FEDSIM_COMMAND", "flwr run")  # whoever typed it, typed it elsewhere
    try:
        scenario = Scenario.from_flat(context.run_config)
        check_writable(output_dir(scenario))
        check(Parts(scenario), here=engine == "simulation")
    except ScenarioError as error:
        print(f"fedsim: refused: {error}", flush=True)
        raise
    folder = RunFolder.create(scenario, run_id=context.run_id, engine=engine, command=command)
    print(f"run folder: {folder.path}", flush=True)
    print(run(scenario, grid, context, folder), flush=True)
