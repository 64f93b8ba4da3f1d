"""What a program asks of the file system, in order: `python syscalls.py LOG ROOT -- COMMAND...` (Linux; no privileges needed).

The command runs under ptrace; a seccomp filter stops it at the calls below, whichever library makes them. LOG gets one JSON object
for each call below ROOT that succeeded, when it returned: {"op": "create" | "mkdir" | "rename" | "remove" | "sync", ...}, files and
directories by their inode numbers, and with a "sync" of a file the bytes that it had then. `PowerLoss` plays them back up to a
moment and writes what a disk holds then.
"""

import base64
import ctypes
import errno
import json
import os
import platform
import random
import signal
import stat
import struct
import sys
from pathlib import Path

CALLS = {  # number -> (name, the arguments that are: directory, path, [directory, path])
    "x86_64": {2: "open", 257: "openat", 85: "creat", 83: "mkdir", 258: "mkdirat", 82: "rename", 264: "renameat", 316: "renameat2",
               87: "unlink", 263: "unlinkat", 84: "rmdir", 74: "fsync", 75: "fdatasync"},
    "aarch64": {56: "openat", 34: "mkdirat", 38: "renameat", 276: "renameat2", 35: "unlinkat", 82: "fsync", 83: "fdatasync"},
}  # fmt: skip
AT = {"openat": 1, "mkdirat": 1, "renameat": 2, "renameat2": 2, "unlinkat": 1}  # with a directory before each path
_CONT, _SYSCALL, _SETOPTIONS, _INFO = 7, 24, 0x4200, 0x420E
_OPTIONS = 1 | 2 | 4 | 8 | 16 | 128 | 0x100000  # good, fork, vfork, clone, exec, seccomp, exit with the tracer
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request, pid, address=0, data=0) -> int:
    found = _libc.ptrace(request, pid, address, data)
    if found == -1 and ctypes.get_errno() not in (0, errno.ESRCH):  # ended meanwhile
        raise OSError(ctypes.get_errno(), "ptrace")
    return found


def install_filter(numbers) -> None:
    """Stops at these calls; at an open only where it may create."""
    load, equal, has, give = 0x20, 0x15, 0x45, 0x06
    allow, trace = 0x7FFF0000, 0x7FF00000
    program = [(load, 0, 0, 0)]
    for number, name in numbers.items():
        if name in ("open", "openat"):
            flags = 16 + 8 * (2 if name == "openat" else 1)
            program += [
                (equal, 0, 4, number),
                (load, 0, 0, flags),
                (has, 0, 1, os.O_CREAT),
                (give, 0, 0, trace),
                (give, 0, 0, allow),
            ]
        else:
            program += [(equal, 0, 1, number), (give, 0, 0, trace)]
    program.append((give, 0, 0, allow))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    assert _libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges: a filter asks for that
    assert _libc.prctl(22, 2, header, 0, 0) == 0


def text_at(tid, address) -> str:
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        found = b""
        while b"\0" not in found:
            found += memory.read(min(256, 4096 - (address + len(found)) % 4096))
    return os.fsdecode(found.split(b"\0")[0])


class Tracer:
    def __init__(self, log, root):
        self.log, self.root = open(log, "w"), os.path.realpath(root)  # noqa: SIM115
        self.calls = CALLS[platform.machine()]
        self.inside = {}  # thread -> (name, arguments, paths, inodes that go away)

    def where(self, tid, name, arguments) -> list[str]:
        """Absolute paths that a call names."""
        width = 1 + (name in AT)
        count = 2 if name.startswith("rename") else 1
        found = []
        for k in range(count):
            *at, address = arguments[k * width : (k + 1) * width]
            base = os.readlink(f"/proc/{tid}/cwd")
            if at and ctypes.c_int(at[0] & 0xFFFFFFFF).value >= 0:
                base = os.readlink(f"/proc/{tid}/fd/{ctypes.c_int(at[0] & 0xFFFFFFFF).value}")
            path = os.path.join(base, text_at(tid, address))
            found.append(os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)))
        return found

    def enter(self, tid, number, arguments):
        name = self.calls[number]
        paths = [] if "sync" in name else self.where(tid, name, arguments)
        old = os.lstat(paths[0]).st_ino if (name.startswith(("rename", "unlink", "rmdir")) and os.path.lexists(paths[0])) else None
        self.inside[tid] = name, arguments, paths, old, [os.stat(os.path.dirname(path)).st_ino for path in paths
                                                         if os.path.exists(os.path.dirname(path))]  # fmt: skip

    def leave(self, tid, value):
        name, arguments, paths, old, parents = self.inside.pop(tid)
        if value < 0 or any(not (path + "/").startswith(self.root + "/") for path in paths):
            return
        if "sync" in name:
            link = f"/proc/{tid}/fd/{arguments[0]}"
            if not (os.readlink(link) + "/").startswith(self.root + "/"):
                return
            about = os.stat(link)
            entry = {"op": "sync", "inode": about.st_ino}
            if stat.S_ISREG(about.st_mode):
                with open(link, "rb") as file:
                    entry["bytes"] = base64.b64encode(file.read()).decode()
        elif name in ("open", "openat", "creat"):
            inode = os.stat(f"/proc/{tid}/fd/{value}").st_ino
            truncated = name == "creat" or bool(arguments[1 + (name in AT)] & os.O_TRUNC)
            entry = {
                "op": "create",
                "parent": parents[0],
                "name": os.path.basename(paths[0]),
                "inode": inode,
                "truncated": truncated,
            }
        elif name.startswith("mkdir"):
            entry = {"op": "mkdir", "parent": parents[0], "name": os.path.basename(paths[0]), "inode": os.stat(paths[0]).st_ino}
        elif name.startswith("rename"):
            entry = {"op": "rename", "inode": old, "from": [parents[0], os.path.basename(paths[0])],
                     "to": [parents[1], os.path.basename(paths[1])]}  # fmt: skip
        else:
            entry = {"op": "remove", "parent": parents[0], "name": os.path.basename(paths[0]), "inode": old}
        self.log.write(json.dumps(entry) + "\n")

    def run(self, command) -> int:
        child = os.fork()
        if child == 0:
            ptrace(0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            install_filter(self.calls)
            os.execvp(command[0], command)
        os.waitpid(child, 0)
        ptrace(_SETOPTIONS, child, 0, _OPTIONS)
        ptrace(_CONT, child)
        buffer, known, code = ctypes.create_string_buffer(128), {child}, 1
        while True:
            try:
                tid, status = os.waitpid(-1, 0x40000000)
            except ChildProcessError:
                break
            if not os.WIFSTOPPED(status):
                self.inside.pop(tid, None)
                if tid == child:
                    code = os.waitstatus_to_exitcode(status)
                continue
            signals, then = os.WSTOPSIG(status), _CONT
            if status >> 16 == 7:  # seccomp: a call begins
                ptrace(_INFO, tid, 128, ctypes.addressof(buffer))
                number, *arguments = struct.unpack_from("7Q", buffer, 24)
                self.enter(tid, number, arguments)
                signals, then = 0, _SYSCALL
            elif signals == signal.SIGTRAP | 0x80:  # ... and ends
                ptrace(_INFO, tid, 128, ctypes.addressof(buffer))
                self.leave(tid, struct.unpack_from("q", buffer, 24)[0])
                signals = 0
            elif status >> 16 or (signals == signal.SIGSTOP and tid not in known):
                signals = 0
            known.add(tid)
            ptrace(then, tid, 0, signals)
        self.log.close()
        return code


class PowerLoss:
    """A disk, call by call, with what POSIX promises of it and nothing more: a file's bytes are there as of its last sync, a
    directory's names as of its own; any later change of a name may be there or not, of each directory independently."""

    def __init__(self, log, root):
        self.calls = [json.loads(line) for line in Path(log).read_text().splitlines()]
        self.root = os.stat(root).st_ino

    def at(self, moment: int, folder: Path, rng: random.Random, how: str) -> None:
        """Writes to `folder` what is there when the power goes after `moment` calls. how: which changed names that were not synced
        are there: "none", "all", or "some" of them, the first few of each directory."""
        names, safe, pending, data = {self.root: {}}, {self.root: {}}, {self.root: []}, {}

        def change(parent, *changes):
            for table in (names, safe):
                table.setdefault(parent, {})
            pending.setdefault(parent, [])
            for name, inode in changes:
                names[parent][name] = inode
            pending[parent].append(changes)

        for call in self.calls[:moment]:
            op = call["op"]
            if op == "sync" and "bytes" in call:
                data[call["inode"]] = base64.b64decode(call["bytes"])
            elif op == "sync":
                safe[call["inode"]] = dict(names.get(call["inode"], {}))
                pending[call["inode"]] = []
            elif op in ("create", "mkdir"):
                new = names.get(call["parent"], {}).get(call["name"]) != call["inode"]
                if new:
                    data.pop(call["inode"], None)  # numbers are used again
                    for table in (names, safe, pending):
                        table.pop(call["inode"], None)
                    if op == "mkdir":
                        names[call["inode"]], safe[call["inode"]], pending[call["inode"]] = {}, {}, []
                    change(call["parent"], (call["name"], call["inode"]))
                elif call["truncated"]:
                    data.pop(call["inode"], None)
            elif op == "rename":
                (old, name), (new, final) = call["from"], call["to"]
                if old == new:
                    change(old, (name, None), (final, call["inode"]))
                else:
                    change(new, (final, call["inode"]))
                    change(old, (name, None))
            else:
                change(call["parent"], (call["name"], None))

        def write(inode, path):
            if inode not in names:
                path.write_bytes(data.get(inode, b""))
                return
            path.mkdir()
            held = dict(safe[inode])
            count = {"none": 0, "all": len(pending[inode])}.get(how, rng.randint(0, len(pending[inode])))
            for changes in pending[inode][:count]:
                held.update(changes)
            for name, below in held.items():
                if below is not None:
                    write(below, path / name)

        write(self.root, folder)


if __name__ == "__main__":
    split = sys.argv.index("--")
    raise SystemExit(Tracer(*sys.argv[1:split]).run(sys.argv[split + 1 :]))
