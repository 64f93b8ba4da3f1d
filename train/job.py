"""What every job has: its options of place and safety, its directory, its errors in one line, its end.

@dataclass(frozen=True, kw_only=True)
class Finetune(JobOptions): ...

def main(argv=None):
    return guard("train.finetune", lambda stop: run(parse(argv), stop))

if __name__ == "__main__":
    end(main())
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import fsspec
import jax
from etils import epath

from train import code, distributed
from train.files import make_directory, read_object, write_atomically
from train.meeting import Told
from train.signals import TERMINATED, Stop

# What a job is written for, whatever the environment has for other programs (`kernels/settings.py`).
_SETTINGS = {
    "jax_numpy_rank_promotion": "allow", "jax_numpy_dtype_promotion": "standard", "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32", "jax_threefry_partitionable": True,  # another draws other weights and masks
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Where a job runs and how it survives; none of it changes what is computed."""

    distributed: str = "auto"
    """auto: as Cloud TPU, GKE, Kubernetes, SLURM or Open MPI started it. off: one process. HOST:PORT,N,ID: process ID of N."""
    heartbeat_timeout: int = 60
    """Seconds of silence after which a process counts as dead, and the job ends."""
    join_timeout: int = 300
    """Seconds that the processes of a job have to come together at its start."""
    shutdown_timeout: int = 60
    """Seconds that a process which is done waits for the others."""
    step_timeout: int = 1800
    """Seconds without a step after which every thread's stack is printed and the job ends; 0 for never. Compiling counts."""
    bad_steps: int = 20
    """Stop after so many steps in a row whose loss or gradient is not finite. Each of them is skipped."""
    checkpoint_wait: bool = False
    """Wait at each checkpoint until it is whole: a kill then loses at most --checkpoint-every steps, and every save costs all of
    its time. Otherwise a save goes on beside the next steps, and a kill before it is whole loses those and the interval before."""

    def check_job(self) -> None:
        """Raises ValueError for a value out of range."""
        for name, least in (
            ("heartbeat_timeout", 1),
            ("join_timeout", 1),
            ("shutdown_timeout", 1),
            ("step_timeout", 0),
            ("bad_steps", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least} is required")
        guards = [name for name in os.environ if name.startswith("JAX_TRANSFER_GUARD") and "disallow" in os.environ[name]]
        if os.environ.get("JAX_DISABLE_JIT", "").lower() in ("1", "true", "y", "yes", "t", "on"):
            raise ValueError("JAX_DISABLE_JIT: a job's step is one compiled program, which takes minutes op by op: unset it")
        if guards:
            raise ValueError(f"{guards[0]}={os.environ[guards[0]]}: steps, losses and keys are moved as JAX finds best: unset it")

    def join(self) -> None:
        """Joins the other processes of the job, if there are any. Before anything asks for devices."""
        self.check_job()
        for name, value in _SETTINGS.items():
            if hasattr(jax.config, name):  # of an older or newer version
                jax.config.update(name, value)
        layout = distributed.parse(self.distributed)
        distributed.start(layout, heartbeat=self.heartbeat_timeout, shutdown=self.shutdown_timeout, join=self.join_timeout)
        distributed.agree(JAX_DEFAULT_MATMUL_PRECISION=jax.config.jax_default_matmul_precision)  # pyright: ignore


# What each process may choose for itself: where it stands in the job, and how its host decodes images
_OWN = {"config", "distributed", "threads", "workers"}


def agree(args, **more) -> None:
    """Raises ValueError, on every process alike, where the processes of a job differ in an option, in code or versions, or in
    `more`, which is JSON-able: some would wait for others for ever, or compute with other weights or images and say nothing."""
    if distributed.count() == 1:
        return
    options = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(args).items() if name not in _OWN}
    distributed.agree(**options | {"code": code.digest(), "versions": code.versions()} | more)


# --- the beginning and the end ----------------------------------------------------------------------------------------------


def guard(program: str, work: Callable[[Stop], None], *, saves: bool = True) -> int:
    """Runs a job; returns its exit code: 0, 2 with one line on stderr for whatever a user can mend, 130 for an interrupt.

    work: gets the `Stop` that a SIGTERM asks. saves: whether it saves then; a job that has nothing to save is ended by the first
    SIGTERM, with code 143: every file that it writes appears whole or not at all. Other exceptions pass, where the process is
    alone; in a job of several they are printed and the code is 1. Whatever the failure, the other processes are told.
    """
    who, line = program, None

    def at_once():
        distributed.fail("asked to stop")
        _print(f"{program}: asked to stop: ended, nothing is left half-written")
        os._exit(TERMINATED)

    try:
        with Stop(None if saves else at_once) as stop:
            work(stop)
            distributed.leave()
        return 0
    except (ValueError, NotImplementedError, OSError, jax.errors.JaxRuntimeError) as error:
        from_device = isinstance(error, jax.errors.JaxRuntimeError)
        no_memory = from_device and "RESOURCE_EXHAUSTED" in str(error)
        if os.environ.get("VITCORE_TRACEBACK") or (from_device and not no_memory):
            if distributed.count() == 1:
                raise
            traceback.print_exc()
        advice = "lower --batch-size, raise --accumulate, or add --remat: " if no_memory else ""
        code, line = 2, f"error: {advice}{(str(error).splitlines() or [type(error).__name__])[0]}"
    except Told as told:
        code, line = TERMINATED, f"asked to stop before it began ({told}): nothing was changed"
    except KeyboardInterrupt:
        code, line = 130, "interrupted; the same command resumes from the latest checkpoint"
    except Exception as error:
        if _without_device(error):
            where = os.environ.get("JAX_PLATFORMS") or "not set"
            said = " ".join(str(error).split()) or "no plugin of that platform is installed"
            code, line = 2, f"error: JAX finds no device (JAX_PLATFORMS: {where}): {said}"
        else:
            if distributed.count() == 1:
                raise
            traceback.print_exc()
            code, line = 1, f"error: {type(error).__name__}: {error}"
    if distributed.count() > 1:
        who = f"{program}: process {distributed.rank()}"
    _print(f"{who}: {line}")
    distributed.fail(line)
    return code


def _without_device(error: Exception) -> bool:
    """Whether JAX failed to begin: what it raises then, even an assertion, is of no kind of its own."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and os.path.basename(last.tb_frame.f_code.co_filename) == "xla_bridge.py"


def _print(line: str) -> None:
    """A line on stderr; that nobody reads it any more changes nothing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def say(line: str) -> None:
    """A line on stdout, from process 0."""
    if distributed.rank() == 0:
        with contextlib.suppress(OSError, ValueError):  # that nobody reads it any more changes nothing
            print(printable(line), flush=True)


def printable(line: str) -> str:
    """With the bytes of a file's name that are no UTF-8 as \\xNN: a stream would refuse the whole line for them."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stopped(result, out, within: str = "") -> bool:
    """Whether a run ended because a signal asked it to; says so, and ends the process where a thread would keep it. result: of
    `train.loop.train`; within: which of several runs, " in dev/lr-0.1"."""
    if result.asked_to_stop:
        say(f"asked to stop{within} at step {result.steps}: the same command resumes there; {out}")
        if result.stuck:
            distributed.leave()
            end(0, now=True)
    return result.asked_to_stop


def end(code: int, *, now: bool = False) -> None:
    """Ends the process. After a failure, or `now`, at once: an ordinary exit would wait for threads of a failed write, for the
    other processes, or for data that never come, and there is nothing left to save."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            now = True  # Python would say so, and make its exit code 120
    if code or now:
        os._exit(code)
    sys.exit(0)


# --- the directory of a run -------------------------------------------------------------------------------------------------


def place(out) -> epath.Path:
    """A run's directory as a path: local or gs://. ValueError for another scheme, and where gs:// lacks its packages."""
    scheme, colon, _ = os.fspath(out).partition("://")
    if colon and scheme != "gs":
        raise ValueError(f"--out {out}: a local path or gs://BUCKET/PATH is required")
    if set(os.path.abspath(os.fspath(out))) & set("[*?\\"):
        raise ValueError(f"--out {out}: a path without [, *, ? and \\ is required, of which checkpoints would be lost")
    if not _utf_8(os.fspath(out)):
        raise ValueError(
            f"--out {printable(os.fspath(out))}: a path in UTF-8 is required, as what writes checkpoints takes no other"
        )
    if colon:
        try:
            fsspec.get_filesystem_class("gs")
        except ImportError:
            raise ValueError(f"--out {out}: gs:// needs gcsfs and google-cloud-storage: pip install 'vitcore[gcs]'") from None
    return epath.Path(os.fspath(out))


def _utf_8(text: str) -> bool:
    """Whether a path can be said to a library in C++; of other bytes Python has lone surrogates."""
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


# Options that came after runs had been made, and what those runs did: a run without them in its config.json had these values.
BEFORE: dict = {
    "head_bias": 0.0, "antialias": True, "crop": "torchvision", "randaugment": [0, 0], "cutmix": 0.0, "mixup_share": "row",
    "position": "1d", "erase": 0.0, "init": None, "optimizer": "sgd", "mixup": 0.0, "weight_decay": None, "layer_decay": None,
    "objective": "classes", "masked_target": None, "corrupt": None,
    "width": None, "depth": None, "mlp_dim": None, "num_heads": None, "sgd": None, "allow_nonfinite": False, "eps": 1e-6,
    "drop_path": 0.0, "sam": 0.0, "block": None, "stem": None, "registers": None, "repeats": 1,
}  # fmt: skip

NAMED = {"mixup"}  # of these, what pre-training has always named its directories by


def differing(identity: dict, held: dict) -> list[str]:
    """The options in which a run whose config.json is `held` is another than this one."""
    return [key for key, value in identity.items() if (held[key] != value if key in held else not _as_before(key, value))]


def _as_before(key: str, value) -> bool:
    """Whether a value is what runs did before there was that option; None where it has no effect."""
    return value is None or (key in BEFORE and BEFORE[key] == value)


def identity(args, placement: frozenset[str]) -> dict:
    """What makes a run of resolved options the run it is, and no other: all but `placement`, JSON-able."""
    return json.loads(json.dumps({k: v for k, v in dataclasses.asdict(args).items() if k not in placement}))


def directory(out: str | None, name: str, identity: dict) -> epath.Path:
    """Where a run lives: --out, or runs/NAME-HASH, the same for the same identity."""
    if out is not None:
        return place(out)
    named = {key: value for key, value in identity.items() if key in NAMED or not (key in BEFORE and _as_before(key, value))}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:8]
    return place("runs") / f"{name}-{digest}".replace("/", "_")


BEGAN_FROM = "began_from"  # of config.json: which weights --init was when the run began, `train.pretrained.Stored.model`


def model_of_run(out: epath.Path) -> dict | None:
    """Which weights the run in `out` began from, where it has a checkpoint to go on from and says so. Every process calls it."""
    held = None
    if distributed.rank() == 0 and (out / "config.json").exists() and (out / "checkpoints").exists():
        with contextlib.suppress(ValueError):  # damaged: `check_claim` says so
            held = read_object(out / "config.json", cure="restore it").get(BEGAN_FROM)
    return distributed.broadcast(held)


def check_claim(out: epath.Path, identity: dict) -> None:
    """Raises ValueError where `out` cannot be, or holds, another run than this; changes nothing.

    identity: what makes a run the run it is, JSON-able; kept in config.json among the rest.
    """
    path = out / "config.json"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: a directory, new or this run's own, is required")
    if path.exists():
        held = read_object(path, cure="restore it, or choose another --out")
        other = differing(identity, held)
        if other:
            what = ", ".join(f"{key} {held.get(key, BEFORE.get(key))} there, {identity[key]} now" for key in other[:3])
            longer = ""
            if "steps" in other and held.get("steps", 0) < (identity["steps"] or 0):
                longer = f"; a longer run starts from that one, its schedule anew: --init {out} and another --out"
            raise ValueError(
                f"--out {out} holds another run ({what}): choose another --out, or give that run's options to continue it{longer}"
            )
    elif left := [name for name in ("metrics.jsonl", "checkpoints") if (out / name).exists()]:
        raise ValueError(f"--out {out} holds {left[0]} but no config.json to say whose: restore that, or choose another --out")


def claim(out: epath.Path, identity: dict, config: dict) -> None:
    """Makes the run's directory and puts config.json there, whole or not at all. Raises as `check_claim`, and OSError."""
    check_claim(out, identity)
    make_directory(out)
    write_atomically(out / "config.json", json.dumps(config | {"out": str(out)}, indent=2) + "\n")


@contextlib.contextmanager
def locked(out: epath.Path):
    """Keeps other jobs of this machine out of a run's directory, which is made. ValueError where one is in it. Process 0 does it.

    On gs:// there is no lock: there the scheduler must see to it that a run runs once.
    """
    if "://" in str(out) or distributed.rank():
        yield
        return
    make_directory(out)
    try:
        descriptor = os.open(out / ".lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        what = {errno.ELOOP: "a symbolic link", errno.ENXIO: "a pipe"}.get(error.errno or 0)
        other = f": {error.strerror}" if what is None else f" is {what}, which no run makes: remove it"
        raise ValueError(f"{out / '.lock'}{other}") from error
    with open(descriptor, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {out} is in use by another process: wait for it, or choose another --out") from None
        yield
