"""The far side of sandbox.py: takes away what a program must not have, runs it, and reports. Only the standard library.

Two processes: the outer one waits and reports, the inner one is the program. The outer one dies with the process that wants to
know, the inner one with the outer one, and as the first process of its own namespace takes all that it started with it.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

NEW_USER, NEW_PROCESSES, NEW_NETWORK, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PROCESSES, FILES, FILE_BYTES = 32, 64, 16 << 20
NOBODY = 65534
# Landlock (linux/landlock.h): its three system calls, and rights to read, to run, and to change files.
CREATE, ADD, RESTRICT = 444, 445, 446
READ = 1 << 0 | 1 << 2 | 1 << 3
CHANGE = 1 << 1 | sum(1 << bit for bit in range(4, 13))
READABLE = ("/usr", "/lib", "/lib64", "/dev/null", "/dev/urandom", "/etc/localtime", "/etc/ld.so.cache")


def main() -> None:
    folder, tell, memory, seconds = sys.argv[1], *map(int, sys.argv[2:5])
    program = sys.stdin.buffer.read().decode()
    libc = ctypes.CDLL(None, use_errno=True)
    missing = _separate(libc)
    _die_with_parent(libc)
    told, inner_tells = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (told, tell):
            os.close(descriptor)
        _inside(libc, folder, memory, seconds, missing, inner_tells, program)
    os.close(inner_tells)
    os.close(1)
    os.close(2)
    _, status = os.waitpid(child, 0)
    with os.fdopen(told, "rb") as file:
        said = _merged(missing, file.read(1 << 15), status)
    os.write(tell, json.dumps(said).encode())


def _die_with_parent(libc: ctypes.CDLL) -> None:
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _merged(missing: list[str], lines: bytes, status: int) -> dict[str, Any]:
    """What the outer process reports: by what the inner one said before it ended, and how it ended."""
    said: dict[str, Any] = {
        "finished": False,
        "reason": f"exited with {os.waitstatus_to_exitcode(status)} before its end",
    }
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            said |= json.loads(line)
    if os.WIFSIGNALED(status):
        said["signal"] = os.WTERMSIG(status)
    return {"missing": missing} | said


def _separate(libc: ctypes.CDLL) -> list[str]:
    """Namespaces without network, and in which the next process is the first; what could not be had."""
    wanted = {"no network": NEW_NETWORK | NEW_IPC, "processes apart": NEW_PROCESSES}
    everything = NEW_NETWORK | NEW_IPC | NEW_PROCESSES
    if libc.unshare(everything) == 0 or libc.unshare(NEW_USER | everything) == 0:
        return []
    return [what for what, flags in wanted.items() if libc.unshare(flags) != 0]


def _inside(
    libc: ctypes.CDLL, folder: str, memory: int, seconds: int, missing: list[str], tell: int, program: str
) -> None:
    """Runs the program in this process, which then ends. It tells a line before and one after."""
    _die_with_parent(libc)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.set_inheritable(tell, False)
    libraries = sys.path
    if os.geteuid() == 0:  # else the limit on processes would not apply
        _open_libraries()
        os.chown(folder, NOBODY, NOBODY)
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        _die_with_parent(libc)  # a change of user clears it, and so does a namespace of users
    if not _only_own_files(libc, folder, [*sys.path, *libraries]):
        missing = [*missing, "files apart"]
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.write(tell, json.dumps({"missing": missing}).encode() + b"\n")
    said = {"finished": True, "reason": "ran to its end"}
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        said = {"finished": False, "reason": reason}
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os.write(tell, json.dumps(said).encode() + b"\n")
    os._exit(0)


def _open_libraries() -> None:
    """Python finds its modules through open descriptors, also where its folder is one that only root may enter."""
    opened = {path: f"/proc/self/fd/{os.open(path, os.O_PATH)}" for path in sys.path if os.path.isdir(path)}
    sys.path = list(opened.values())
    for module in list(sys.modules.values()):
        for path in getattr(module, "__path__", ()):
            folder, name = os.path.split(path)
            if folder in opened:
                module.__path__ = [os.path.join(opened[folder], name)]


def _only_own_files(libc: ctypes.CDLL, folder: str, libraries: list[str]) -> bool:
    """Whether Landlock now confines this process to its folder and, for reading, to Python's files."""
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    abi = libc.syscall(CREATE, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    change = CHANGE | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    rules = libc.syscall(CREATE, struct.pack("Q", READ | change), ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    readable = [*READABLE, *libraries]
    for path, rights in [(folder, READ | change), *((path, READ) for path in readable)]:
        with contextlib.suppress(OSError):
            place = os.open(path, os.O_PATH)
            if not os.path.isdir(path):
                rights &= 1 << 0 | 1 << 1 | 1 << 2
            libc.syscall(ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    confined = libc.syscall(RESTRICT, rules, 0) == 0
    os.close(rules)
    return confined


if __name__ == "__main__":
    main()
