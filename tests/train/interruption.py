"""A run that is interrupted between two steps, as by Ctrl-C."""

import train.loop

_MAKE = train.loop.make_train_step


def interrupt_before(monkeypatch, steps: int | None) -> list:
    """KeyboardInterrupt in place of a job's step when so many were taken, until `monkeypatch.undo()` or the next call; None: never.
    Returns a list with an entry for each step that is taken from now on."""
    taken = []

    def stopping(*args):
        step = _MAKE(*args)

        def wrapped(*batch):
            if len(taken) == steps:
                raise KeyboardInterrupt
            taken.append(1)
            return step(*batch)

        return wrapped

    monkeypatch.setattr(train.loop, "make_train_step", stopping)
    return taken
