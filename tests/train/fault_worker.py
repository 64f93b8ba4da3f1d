"""The pre-training job with a fault in it: `python fault_worker.py FAULT ... -- OPTIONS`, for the fault tests.

A FAULT is WHAT[@STEP][:RANK], and happens on that rank (default: every one) when the STEP-th step of this process is about to
be taken (default: the first). A line "AT ..." on stderr says that the job has come to a place, for the test to act at.

    say-compile say-train say-eval say-save say-data    announces the place; train and eval wait there until a signal comes
    raise hang nan                           an exception, a step that never ends, a batch of NaN (from that step on: nan+)
    stop-eval hang-eval                      in an evaluation: stopped for 9 s, under a limit of 4 s; or hung for ever
    tightN                                   the watchdog's limit is N seconds from that step on
    kill-commit                              SIGKILL in mid-commit: the arrays are written, the rename is still to come
    other-code                               a process with other code
    trace=PATH                               after the run: what was restored and which examples were used, to PATH.RANK.npz
"""

import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np

import train.code
import train.distributed
import train.loop
import train.manifest
from train import job, pretrain

FAULTS, TRACE, OPTIONS = {}, None, sys.argv[sys.argv.index("--") + 1 :]
for word in sys.argv[1 : sys.argv.index("--")]:
    if word.startswith("trace="):
        TRACE = word.removeprefix("trace=")
        continue
    what, step, rank = re.fullmatch(r"([a-z+-]+\d*)(?:@(\d+))?(?::(\d+))?", word).groups()  # pyright: ignore
    FAULTS[what] = (int(step or 1), None if rank is None else int(rank))


def here(what: str, step: int | None = None) -> bool:
    at, rank = FAULTS.get(what, (None, None))
    return at is not None and (step is None or step == at) and rank in (None, train.distributed.rank())


def say(place: str, *, until_asked=None) -> None:
    print(f"AT {place}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + 60
    while until_asked is not None and not until_asked() and time.monotonic() < deadline:
        time.sleep(0.01)


# --- the places where a fault can be put ------------------------------------------------------------------------------------

taken, seen = 0, {"image": [], "label": []}
loops = []
make_loop, make_step = train.loop._Loop.__init__, train.loop.make_train_step


def remember(self, *args):
    loops.append(self)
    make_loop(self, *args)


def faulty_step(*args):
    step = make_step(*args)

    def wrapped(state, image, label):
        global taken
        taken += 1
        if TRACE:
            if taken == 1:
                restored(state)
            for name, array in (("image", image), ("label", label)):
                here_first = [s for s in array.addressable_shards if s.replica_id == 0]
                rows = np.concatenate([np.asarray(s.data) for s in sorted(here_first, key=lambda s: s.index[0].start or 0)])
                seen[name].append(rows.reshape(len(rows), -1).sum(1, dtype=np.float64))
        if here("say-compile", taken):
            say("compile")
        if here("say-train", taken):
            say("train", until_asked=lambda: loops[0].stop.asked)
        if here("raise", taken):
            raise RuntimeError("a fault that was put here")
        for limit in [word for word in FAULTS if word.startswith("tight") and here(word, taken)]:
            loops[0].watchdog.seconds = int(limit.removeprefix("tight"))
        if here("hang", taken):
            say("hang")
            time.sleep(1e6)
        if here("nan", taken) or ("nan+" in FAULTS and taken >= FAULTS["nan+"][0]):
            image = image * float("nan")
        return step(state, image, label)

    return wrapped


found = {}


def restored(state):
    """Every array of the state as all processes hold it together, as bytes' checksums: the same whatever the mesh."""
    import zlib

    from jax.experimental import multihost_utils

    for path, leaf in jax.tree.leaves_with_path(state):
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True)) if jax.process_count() > 1 else np.asarray(leaf)
        found["state" + jax.tree_util.keystr(path)] = np.int64(zlib.crc32(np.ascontiguousarray(whole).tobytes()))


train.loop._Loop.__init__ = remember  # pyright: ignore
train.loop.make_train_step = faulty_step

if {"say-eval", "stop-eval", "hang-eval"} & FAULTS.keys():
    put = train.loop._Loop.evaluate

    def evaluate(self):
        if here("say-eval"):
            say("eval", until_asked=lambda: self.stop.asked)
        if {"stop-eval", "hang-eval"} & FAULTS.keys():
            self.eval_fn = held_up(self, self.eval_fn)
        return put(self)

    def held_up(self, measure):
        """An evaluation that is beyond its compilation, and is held up behind its first batch."""
        calls = []

        def wrapped(*batch):
            found = jax.block_until_ready(measure(*batch))
            calls.append(1)
            if len(calls) == 2:
                self.watchdog.seconds = 4
                say("evaluation")
                if here("hang-eval"):
                    time.sleep(1e6)
                subprocess.Popen(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 9; kill -CONT {os.getpid()}"])
                time.sleep(2)
                self.watchdog.seconds = 600
            return found

        return wrapped

    train.loop._Loop.evaluate = evaluate

write = train.manifest.write


def write_or_die(directory):
    if "state" in str(directory):
        if here("say-save"):
            say("save")
            time.sleep(1)
        if taken >= FAULTS.get("kill-commit", (0,))[0] and here("kill-commit"):
            os.kill(os.getpid(), signal.SIGKILL)
    write(directory)


train.manifest.write = write_or_die
if "kill-commit" in FAULTS:
    save = train.manifest._Measured.save

    async def save_or_die(self, directory, checkpointable):
        """On a rank that writes no manifest: killed when its own arrays are under way."""
        then = await save(self, directory, checkpointable)
        if train.distributed.rank() and taken >= FAULTS["kill-commit"][0] and here("kill-commit"):
            os.kill(os.getpid(), signal.SIGKILL)
        return then

    train.manifest._Measured.save = save_or_die

if "say-data" in FAULTS:
    from train.data import TrainBatches

    draw, drawn = TrainBatches.__next__, []

    def slow(self):
        drawn.append(1)
        if len(drawn) > FAULTS["say-data"][0] and here("say-data"):
            while taken < FAULTS["say-data"][0]:
                time.sleep(0.01)
            time.sleep(1)  # that step is done, and the loop waits
            say("data")
            time.sleep(1e6)
        return draw(self)

    TrainBatches.__next__ = slow

digest = train.code.digest
train.code.digest = lambda: "other" if here("other-code") else digest()

if __name__ == "__main__":
    code = pretrain.main(OPTIONS)
    if TRACE:
        everything = found | {name: np.array(rows) for name, rows in seen.items()}
        np.savez(f"{TRACE}.{train.distributed.rank()}.npz", allow_pickle=False, **everything)
    if here("raise"):
        time.sleep(0.4)  # as on a busy machine: the others hear of it before this process has ended
    job.end(code)
