"""Checkpoints on eight simulated devices: values, meshes, what is kept, what is refused, what a failure leaves."""

import json
import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train import reasons, saved
from train.checkpoint import CheckpointError, Checkpoints, abstract


def mesh(data, model):
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def values():
    key = jax.random.key(7)
    kernel = jax.random.normal(key, (2, 16, 8))
    return {"blocks": {"kernel": kernel, "bias": jnp.linspace(-1, 1, 8).astype(jnp.bfloat16)}, "head": {"kernel": kernel[0]}}


def specs(tree):
    return jax.tree.map(lambda w: P(None, "data", "model") if w.ndim == 3 else P("data") if w.ndim == 2 else P(), tree)


def state_on(mesh, params=None):
    """As a train state is: parameters, an optimizer's named tuples, a counter, a typed random key, a None; and a tuple whose
    order is not that of its entries' names ("10" sorts before "2")."""
    params = values() if params is None else params
    state = {
        "params": params,
        "opt": optax.adam(1e-3).init(params),
        "step": jnp.int32(5),
        "key": jax.random.key(3),
        "average": None,
        "many": tuple(jnp.float32(i) for i in range(11)),
    }
    return jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), state, specs(state))


def bits(tree):
    return [
        np.asarray(jax.random.key_data(w) if jnp.issubdtype(w.dtype, jax.dtypes.prng_key) else w) for w in jax.tree.leaves(tree)
    ]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(bits(a), bits(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("shape", [(4, 2), (8, 1), (2, 4), (1, 1), (2, 1)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_a_state_comes_back_to_the_bit_on_any_mesh(tmp_path, shape):
    state, extra = state_on(mesh(4, 2)), {"loader": {"next_index": 2**53 + 1}, "list": [1, 2.5, None, "x"]}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, state, extra)
    target = abstract(state_on(mesh(*shape)))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == 5
        found, found_extra = checkpoints.restore(None, target)
    assert_same(found, state)
    assert found_extra == extra
    for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
        assert len(leaf.sharding.device_set) == shape[0] * shape[1]


def test_every_device_s_part_is_written_and_extra_is_json(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(mesh(4, 2)), {"seed": 3})
    assert json.loads((tmp_path / "1/extra/data.json").read_text()) == {"seed": 3}
    names = {
        entry["key_metadata"][-1]["key"]
        for entry in json.loads((tmp_path / "1/state/_METADATA").read_text())["tree_metadata"].values()
    }
    assert {"kernel", "bias", "step", "count"} <= names


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """Between the call and the write the next step takes the buffers over."""
    params = {"kernel": jnp.arange(4096.0 * 512).reshape(4096, 512)}
    state = jax.tree.map(lambda w: jax.device_put(w, NamedSharding(mesh(8, 1), P("data"))), params)
    before = np.array(state["kernel"])
    step = jax.jit(lambda s: jax.tree.map(lambda w: w * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        target = abstract(state)
        checkpoints.save(1, state, {})
        state = step(state)
        jax.block_until_ready(state)
        found, _ = checkpoints.restore(1, target)
    np.testing.assert_array_equal(found["kernel"], before)
    assert float(state["kernel"].max()) == -1.0


def test_a_save_compiles_nothing(tmp_path, caplog):
    """Orbax by itself compiles a slice for every replica of every small array, seconds on a mesh of many devices."""
    small = {"w": jax.device_put(jnp.arange(77.0 * 8).reshape(77, 8), NamedSharding(mesh(4, 2), P(None, "model")))}
    with jax.log_compiles(), Checkpoints(tmp_path) as checkpoints:
        jax.jit(lambda w: w[3:5, 1:3] + 77)(jnp.zeros((7, 7)))
        assert "Compiling jit" in caplog.text  # or the line below proves nothing
        caplog.clear()
        checkpoints.save(1, small, {})
        checkpoints.wait()
    assert "Compiling jit" not in caplog.text


def test_the_latest_few_stay_and_every_so_many(tmp_path):
    state = {"w": jnp.zeros(3)}
    with Checkpoints(tmp_path, keep=2, every=4) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.steps() == ()
        for step in range(1, 8):
            checkpoints.save(step, {"w": jnp.full(3, float(step))}, {"step": step})
        checkpoints.wait()
        assert checkpoints.steps() == (4, 6, 7)
        for step in (4, 6, 7):
            found, extra = checkpoints.restore(step, abstract(state))
            assert float(found["w"][0]) == extra["step"] == step
        with pytest.raises(ValueError, match=r"no checkpoint of step 5 in .*; it has 4, 6, 7"):
            checkpoints.restore(5, abstract(state))
    assert sorted(os.listdir(tmp_path)) == ["4", "6", "7"]


def test_a_validation_loss_that_is_not_finite_does_not_stop_a_save(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {"scores": {"loss": float("nan"), "worst": float("inf")}})
        _, extra = checkpoints.restore(1, abstract({"w": jnp.ones(2)}))
    assert np.isnan(extra["scores"]["loss"])
    assert extra["scores"]["worst"] == float("inf")


def test_a_relative_directory_will_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        assert checkpoints.directory == str(tmp_path / "run/checkpoints")
        checkpoints.save(0, {"w": jnp.ones(2)}, {})
        checkpoints.wait()
        assert checkpoints.steps() == (0,)
        with pytest.raises(ValueError, match=r"step 0: .* already holds step 0"):
            checkpoints.save(0, {"w": jnp.ones(2)}, {})


def swept(directory, left):
    """Orbax removes debris in the background: wait for it."""
    deadline = time.monotonic() + 20
    while os.listdir(directory) != left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(directory) == left


def test_a_step_in_the_making_is_not_offered_and_is_swept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"w": jnp.ones(2)}, {})
    os.rename(tmp_path / "3", tmp_path / "9.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        swept(tmp_path, [])
        with pytest.raises(ValueError, match=r"no checkpoint in .*; it has none"):
            checkpoints.restore(None, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def subprocess_of(code, *arguments):
    code = "import jax; jax.config.update('jax_num_cpu_devices', 8)\n" + textwrap.dedent(code)
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=root)


@pytest.mark.faults
def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
    done = subprocess_of(
        """
        import os, signal, sys, threading
        import jax.numpy as jnp
        from train.checkpoint import Checkpoints
        directory = sys.argv[1]
        checkpoints = Checkpoints(directory)
        checkpoints.save(1, {"w": jnp.full((256, 256), 1.0)}, {"n": 1})
        checkpoints.wait()
        def kill_when_it_writes():
            while not any("tmp" in name for name in os.listdir(directory)):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill_when_it_writes, daemon=True).start()
        checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (4096, 2048))}, {"n": 2})
        checkpoints.wait()
        print("was not killed")
        """,
        tmp_path,
    )
    assert done.returncode == -9, done
    assert any("tmp" in name for name in os.listdir(tmp_path))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == (1,)
        found, extra = checkpoints.restore(None, abstract({"w": jnp.zeros((256, 256))}))
        swept(tmp_path, ["1"])
    assert float(found["w"].min()) == extra["n"] == 1


@pytest.mark.faults
def test_a_write_that_fails_is_one_line_and_the_next_save_starts_afresh(tmp_path):
    """A limit on the size of files stands in for a full disk: a write fails in Orbax's threads either way."""
    done = subprocess_of(
        """
        import resource, signal, sys, time
        from train.checkpoint import CheckpointError, Checkpoints
        state = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            checkpoints.save(2, state, {})
            for _ in range(600):
                try:
                    checkpoints.check()
                except CheckpointError as error:
                    print(error)
                    break
                time.sleep(0.05)
            else:
                print("check never raised")
            checkpoints.check()
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            checkpoints.save(3, state, {})
            checkpoints.wait()
            print(checkpoints.steps())
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            checkpoints.save(4, state, {})
            try:
                checkpoints.close()
            except CheckpointError as error:
                print(error)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done
    assert done.stderr == ""
    first, steps, last = done.stdout.splitlines()
    assert first.startswith(f"cannot write checkpoint {tmp_path / '2'}: ")
    assert "File too large" in first
    assert first.endswith("whole steps there: 1")
    assert steps == "(1, 3)"
    assert last.startswith(f"cannot write checkpoint {tmp_path / '4'}: ")


@pytest.mark.faults
def test_files_that_cannot_be_read_are_one_line_and_nothing_else(tmp_path):
    done = subprocess_of(
        """
        import os, shutil, sys
        from jax.sharding import NamedSharding, PartitionSpec
        import train.saved
        from train.checkpoint import CheckpointError, Checkpoints, abstract
        split = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        state = {name: jax.device_put(jax.random.normal(jax.random.key(0), (512, 512)), split) for name in "abc"}
        with Checkpoints(sys.argv[1]) as checkpoints:
            checkpoints.save(1, state, {})
            checkpoints.wait()
            for folder, _, files in os.walk(sys.argv[1]):
                for name in files:
                    path = os.path.join(folder, name)
                    if os.path.getsize(path) > 100_000:
                        os.truncate(path, 10)
            def attempt():
                try:
                    checkpoints.restore(1, abstract(state))
                except CheckpointError as error:
                    print(error)
            attempt()
            train.saved._verify = lambda path: None  # as if a disk failed after its files were verified
            attempt()
            shutil.rmtree(sys.argv[1] + "/1/state")
            attempt()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done
    assert done.stderr == ""
    damaged, truncated, missing = done.stdout.splitlines()
    assert damaged.startswith(f"checkpoint {tmp_path / '1'} is damaged: state/")
    assert "has 10 bytes, " in damaged
    assert truncated.startswith(f"cannot read checkpoint {tmp_path / '1'}: ")
    assert missing == f"cannot read checkpoint {tmp_path / '1'}: it holds extra, not state and extra"


def like(change):
    tree = {"params": {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}, "opt": {"mu": (jnp.zeros((4, 2)),)}}
    return change(tree) or tree


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t["params"].update(kernel=jnp.zeros((4, 3))), "params/kernel: expected float32[4, 3], found float32[4, 2]"),
        (lambda t: t["params"].update(bias=jnp.zeros(2, jnp.bfloat16)), "params/bias: expected bfloat16[2], found float32[2]"),
        (lambda t: t["params"].update(cls=jnp.zeros(2)), "params/cls: expected float32[2], found nothing of this name"),
        (lambda t: t["opt"].update(mu=()), "opt/mu/0: expected nothing of this name, found float32[4, 2]"),
        (lambda t: {"w": {str(i): jnp.zeros(1) for i in range(9)}}, "; and 9 more leaves"),
    ],
    ids=["shape", "dtype", "missing", "unknown", "all"],
)
def test_another_tree_is_refused_and_the_leaf_named(tmp_path, change, words):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, like(lambda t: None), {})
        with pytest.raises(ValueError, match="another model or optimizer") as error:
            checkpoints.restore(None, abstract(like(change)))
    assert words in str(error.value)
    assert str(tmp_path / "1") in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_checkpoint_cannot_hold_is_refused_before_a_write(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="leaf a/n is a int"):
            checkpoints.save(1, {"a": {"n": 3}}, {})
        with pytest.raises(ValueError, match="extra of step 1 is not JSON"):
            checkpoints.save(1, {"w": jnp.ones(1)}, {"x": jnp.ones(1)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_directory_that_cannot_be_is_one_line(tmp_path, path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot open the checkpoints in ") as error:
        Checkpoints(tmp_path / path)
    assert str(tmp_path / path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"keep": 0}, {"every": 0}], ids=str)
def test_a_policy_keeps_something(tmp_path, options):
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(tmp_path, **options)


# --- what is said of a failure, and made of it ------------------------------------------------------------------------------


def as_tensorstore_says(path, why):
    """Its errors at writing and reading: the path twice, then the reason, then how the array was opened."""
    opened = "[tensorstore_spec='" + f'"path":"{path}",' * 6 + "']"
    at = f'"params/w/0.0" at local file "{path}/": Failed: "{path}/d/a58aa371"'
    return ValueError(f"DATA_LOSS: Error reading {at}: {why} {opened}")


@pytest.mark.parametrize("path", ["/run", f"/data/{'a_long_name/' * 25}run"], ids=["short", "long"])
def test_the_reason_of_a_failure_is_in_its_line_however_long_the_path(path):
    said = reasons.reason(as_tensorstore_says(path, "No space left on device [os_error_code='28']"))
    assert "No space left on device" in said
    assert "params/w/0.0" in said
    assert len(said) <= 300
    long = reasons.reason(ValueError("begins " + "so " * 200 + "ends"))
    assert len(long) <= 300
    assert long.startswith("begins")
    assert long.endswith("ends")


@pytest.mark.parametrize(
    ("path", "why", "damaged"),
    [
        ("/run", "Permission denied", False),
        (f"/data/{'a_long_name/' * 25}run", "Permission denied", False),
        ("/run", "CRC-32C checksum verification failed", True),
        ("/data/stale/permission-denied/run", "CRC-32C checksum verification failed", True),
    ],
    ids=["may not", "may not, a long path", "damaged", "damaged, in a folder of such a name"],
)
def test_what_may_not_be_read_is_not_called_damaged_and_the_path_does_not_decide(path, why, damaged):
    """A damaged step is put aside by the run that owns it; one that cannot be read just now must not be."""
    with pytest.raises(CheckpointError) as raised, saved._reading(path):
        raise as_tensorstore_says(path, why)
    assert isinstance(raised.value, saved.Damaged) == damaged
