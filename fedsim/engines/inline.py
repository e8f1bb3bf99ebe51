"""The inline engine: every client in this process, one after another, through the same messages.

For tests, labs and small runs, and the reference that the other engines must agree with.
"""

import contextlib
import queue
import secrets
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsim.parts import Parts, check, check_writable
from fedsim.run import run
from fedsim.run_folder import RunFolder, interruptible, output_dir
from fedsim.scenario import Scenario
from fedsim.stopping import stop

CLIENT_APP_RAISED_EXCEPTION = 2  # flwr.common.constant.ErrorCode
HOST = 2  # the one SuperNode's id; Flower's SuperLink has 1


def run_inline(
    scenario: Scenario, command: str, on_folder: Callable[[Path], None] = lambda _: None
) -> Path:
    """Check and run a scenario in this process; return the path of ``report.html``.

    ``on_folder`` is told where the run writes as soon as it does.

    Raises
    ------
    ScenarioError
        Before any client trains.
    RunFailed
        When the run must not be believed; its folder stays.
    """
    check_writable(output_dir(scenario))
    check(Parts(scenario))
    run_id = secrets.randbits(62)
    folder = RunFolder.create(scenario, run_id=run_id, engine="inline", command=command)
    on_folder(folder.path)
    from fedsim.client_app import app

    node_config: dict[str, Any] = {"vault": str(folder.path / "vault")}
    context = Context(run_id, HOST, node_config, RecordDict(), scenario.flat())
    grid = InlineGrid(app, context, scenario.federation.timeout)
    try:
        with interruptible(folder):
            return run(scenario, grid, context, folder)
    finally:
        grid.close()


class InlineGrid(Grid):
    """One SuperNode, hosting every client, that is a function call away.

    Parameters
    ----------
    client_app : ClientApp
    context : Context
        The SuperNode's; its ``state`` is where its clients keep theirs.
    timeout : float
        Seconds one message may take; a client that hangs longer is given up.
    """

    def __init__(self, client_app: ClientApp, context: Context, timeout: float) -> None:
        # Message(...) reads these; they are unset outside a Flower process.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = context.run_id, 1, 1
        self.client_app, self.context, self.timeout = client_app, context, timeout
        self.replies: dict[str, Message] = {}
        self.worker = Worker()

    def set_run(self, run: Run) -> None:
        """There is just this one."""

    @property
    def run(self) -> Run:
        """A run without a record."""
        return Run.create_empty(run_id=self.context.run_id)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message as Flower's own grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the one SuperNode's id."""
        return [self.context.node_id]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver each message and keep its reply."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = str(uuid4())
            self.replies[message_id] = self._deliver(message)
            ids.append(message_id)
        return ids

    def _deliver(self, message: Message) -> Message:
        def failed(reason: str) -> Message:
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

        try:
            return self.worker.call(lambda: self.client_app(message, self.context), self.timeout)
        except TimeoutError:
            self.worker.end(seconds=0)
            self.worker = Worker()
            return failed(f"no answer within {self.timeout:g} s")
        except Exception as error:
            return failed(f"{type(error).__name__}: {error}")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages."""
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002 - each message has the grid's own
    ) -> Iterable[Message]:
        """Deliver, and return the replies."""
        return self.pull_messages(self.push_messages(messages))

    def close(self) -> None:
        """Let the clients' thread go."""
        self.worker.end()


class Worker:
    """One thread that serves clients, so that one that hangs can be left behind."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[
            tuple[Callable[[], Message], list[Any], threading.Event] | None
        ] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._serve, name="inline-clients", daemon=True)
        self.thread.start()

    def end(self, seconds: float = 5.0) -> None:
        """End the thread, in the middle of a client's work if need be."""
        self.jobs.put(None)
        stop(self.thread, seconds)

    def call(self, job: Callable[[], Message], timeout: float) -> Message:
        """Run a job and return its result, or raise what it raises.

        Raises
        ------
        TimeoutError
            If it does not end in time.
        """
        outcome: list[Any] = []
        done = threading.Event()
        self.jobs.put((job, outcome, done))
        if not done.wait(timeout):
            raise TimeoutError
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        message: Message = outcome[0]
        return message

    def _serve(self) -> None:
        with contextlib.suppress(SystemExit):  # how it is ended
            self._work()

    def _work(self) -> None:
        while (given := self.jobs.get()) is not None:
            job, outcome, done = given
            try:
                outcome.append(job())
            except BaseException as error:
                outcome.append(error)
            done.set()
            del given, job, outcome  # keep no model alive while idle
