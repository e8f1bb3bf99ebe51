"""A grid around another passes on whatever it does not say otherwise."""

from typing import Any
from unittest.mock import Mock

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedsim.grid import GridWrapper
from fedsim.population import Ledger, Population
from strategies.channels.secagg import SecAggGrid


def test_every_method_of_flowers_grid_is_passed_on() -> None:
    inner = Mock(spec=Grid)
    around = GridWrapper(inner)
    content = RecordDict()
    calls: dict[str, tuple[Any, ...]] = {
        "set_run": ("the run",),
        "create_message": (content, "train", 3, "1", 60.0),
        "get_node_ids": (),
        "push_messages": ([content],),
        "pull_messages": (["one"],),
    }
    for name, given in calls.items():
        answer = getattr(around, name)(*given)
        assert name == "set_run" or answer is getattr(inner, name).return_value
        getattr(inner, name).assert_called_once_with(*given)
    assert around.send_and_receive([], timeout=2.0) is inner.send_and_receive.return_value
    inner.send_and_receive.assert_called_once_with([], timeout=2.0)
    assert around.run is inner.run
    assert Grid.__abstractmethods__ == {*calls, "send_and_receive", "run"}


def test_population_and_channel_are_such_grids(tmp_path: Any) -> None:
    inner = Mock(spec=Grid)
    population = Population(inner, 2, Ledger(), 1.0, tmp_path)
    channel = SecAggGrid(population, Mock(), Mock(), 1.0)
    assert channel.run is inner.run
    created = channel.create_message(RecordDict(), "train", 1, "1")
    assert created is inner.create_message.return_value
    channel.set_run("the run")
    inner.set_run.assert_called_once_with("the run")
    population.close()
