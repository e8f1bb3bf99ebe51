"""What the range says when it refuses."""


class ScenarioError(ValueError):
    """A scenario that cannot run: the key, its value, and what would be right.

    Raised before any client trains.
    """

    def __init__(self, key: str, value: object, remedy: str) -> None:
        self.key, self.value, self.remedy = key, value, remedy
        super().__init__(f"{key} = {value!r}: {remedy}")


class NotGranted(PermissionError):
    """An attack asked for something that the scenario's threat model does not give it."""


class RunFailed(RuntimeError):
    """A run that started and must not be believed; what it had saved stays readable."""
