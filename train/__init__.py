"""Everything that makes a run: one job per module, started with `python -m train.<job>`."""

from train.signals import end_with_parent

end_with_parent()  # where this is a worker process of one of them
