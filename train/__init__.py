"""Everything that makes a run: one job per module, started with `python -m train.<job>`."""

from kernels import refused as refused  # before jax: it says in one line what jax refuses in the environment
from train.signals import end_with_parent, standard_streams

standard_streams()  # before anything opens a file
end_with_parent()  # where this is a worker process of one of them
