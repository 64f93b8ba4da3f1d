"""Measurements: what the kernels, the model and a training step cost, by the compiler here and by the clock where there is a
TPU."""

from kernels import refused as refused  # before jax: it says in one line what jax refuses in the environment
