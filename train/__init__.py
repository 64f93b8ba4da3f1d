"""Everything that makes a run: one job per module, started with `python -m train.<job>`."""

from train.signals import end_with_parent, standard_streams

standard_streams()  # before anything opens a file
if not end_with_parent():  # where this is no worker process of one of them, which does not load the model
    import vitcore  # noqa: F401  (before jax: it says in one line what jax refuses in the environment)
