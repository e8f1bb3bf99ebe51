"""What an attack trains before or after its search: told as it goes, and ended when asked to."""

from collections.abc import Iterator

from fedsim.threat import Knowledge


def training_steps(
    total: int, what: str, knowledge: Knowledge, receipts: list[str]
) -> Iterator[int]:
    """Yield 0, 1, ... below ``total``; after the first it ends if somebody wants the best so far.

    Parameters
    ----------
    total : int
        Steps there are to make.
    what : str
        What is trained, for progress and receipts.
    knowledge : Knowledge
        Is told of each step, and asked whether to go on.
    receipts : list of str
        Gets a line where the training ended early.
    """
    for step in range(total):
        knowledge.progress(step, total, f"training the {what}")
        yield step
        if knowledge.stopping and step + 1 < total:
            receipts.append(f"stopped by hand: the {what} had {step + 1} of {total} training steps")
            return
