"""The judge of every kernel, and the only tolerance in the repository.

An implementation is compared with its plain reference twice: both run in the dtype under test, and the reference runs once more
in float64. Our error may be at most TWICE the error of the plain implementation in the same dtype, both against float64 (the
rule of the FlashAttention tests), plus a floor of one rounding of the largest true value (where the plain result happens to be
exact, a result that was rounded once more is still right) and two of float32 (sums in another order). Errors are largest absolute
differences, array by array, for the value and for the gradient of every argument (one vector-Jacobian product with a fixed random
cotangent).
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

FACTOR = 2.0


def _value_and_gradients(fn: Callable, args: Sequence, cotangent) -> list[np.ndarray]:
    def both(args, cotangent):
        value, pullback = jax.vjp(fn, *args)
        return value, *pullback(cotangent.astype(value.dtype))

    return [np.asarray(a).astype(np.float64) for a in jax.jit(both)(tuple(args), jnp.asarray(cotangent))]


def check(ours: Callable, plain: Callable, args: Sequence, *, names: Sequence[str] = (), seed: int = 0) -> None:
    """Asserts that `ours(*args)` and all its gradients are as good as `plain(*args)` is.

    args: float arrays, all differentiated; everything else is bound into the two functions, which return one array. names: of the
    arguments, for the message. AssertionError lists every array that is too far off.
    """
    shape = jax.eval_shape(plain, *args)
    cotangent = np.random.default_rng(seed).standard_normal(shape.shape).astype(shape.dtype)
    with jax.enable_x64(True):
        truth = _value_and_gradients(plain, [jnp.asarray(np.asarray(a), jnp.float64) for a in args], cotangent)
    expected = _value_and_gradients(plain, args, cotangent)
    found = _value_and_gradients(ours, args, cotangent)
    labels = ["value", *(f"gradient of {n}" for n in (names or range(len(args))))]
    dtypes = [shape.dtype, *(a.dtype for a in args)]
    wrong = []
    for label, dtype, t, e, f in zip(labels, dtypes, truth, expected, found, strict=True):
        assert f.shape == t.shape, f"{label}: shape {f.shape}, expected {t.shape}"
        floor = 0.5 * float(jnp.finfo(dtype).eps) + 2.0 * float(jnp.finfo(jnp.float32).eps)
        allowed = FACTOR * np.abs(e - t).max() + floor * np.abs(t).max()
        error = np.abs(f - t).max() if np.isfinite(f).all() else np.inf
        if not error <= allowed:
            wrong.append(f"{label}: error {error:.3g}, allowed {allowed:.3g} (largest true value {np.abs(t).max():.3g})")
    assert not wrong, "; ".join(wrong)


def flat(op: Callable, record: Callable) -> Callable:
    """An op over (x, weights) as a function of x and each weight, as `check` wants it. record: the NamedTuple of the weights."""
    return lambda x, *weights, **options: op(x, record(*weights), **options)


def kernels_in(fn: Callable, *args) -> list[str]:
    """Names of the Pallas kernels that `fn(*args)` runs, in the order of the jaxpr, those inside scans and branches included."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["name"]
                continue
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(fn)(*args).jaxpr))


def assert_kernel_ran(fn: Callable, *args, name: str) -> None:
    """Asserts that `fn(*args)` contains a Pallas kernel whose name starts with `name`."""
    names = kernels_in(fn, *args)
    assert any(n.startswith(name) for n in names), f"expected a kernel {name}*, found {names}"


def assert_kernel_compiled(compiled, name: str) -> None:
    """Asserts that a compiled TPU program holds a Mosaic kernel whose name starts with `name`."""
    calls = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert any(re.search(rf'op_name="[^"]*[/(]{name}', line) for line in calls), (
        f"no kernel {name}* among {len(calls)} Mosaic calls"
    )
