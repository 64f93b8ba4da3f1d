"""A run that is interrupted between two steps, as by Ctrl-C."""

import train.loop


def interrupt_before(monkeypatch, steps: int) -> None:
    """KeyboardInterrupt in place of a job's step when so many were taken, until `monkeypatch.undo()`."""
    make, taken = train.loop.make_train_step, []

    def stopping(*args):
        step = make(*args)

        def wrapped(*batch):
            if len(taken) == steps:
                raise KeyboardInterrupt
            taken.append(1)
            return step(*batch)

        return wrapped

    monkeypatch.setattr(train.loop, "make_train_step", stopping)
