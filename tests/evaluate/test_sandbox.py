"""The sandbox: programs that misbehave end within their limit and are reported, and nothing of them is left."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.paths import ROOT

from nanojax.evaluate import sandbox

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def limited(program: str, seconds: float = 3.0, **limits: int) -> sandbox.Result:
    """The program's result; it came within the limit and a second, on a busy machine two."""
    begin = time.monotonic()
    result = sandbox.run(program, seconds, **limits)
    assert time.monotonic() - begin < seconds + 2
    return result


def test_a_good_program_finishes() -> None:
    """Output, imports and files in its own folder work; input is empty; the environment is not ours."""
    result = limited(
        "import math, sys, os\nopen('a.txt', 'w').write('x')\nprint(math.pi, open('a.txt').read())\n"
        "assert sys.stdin.read() == '' and 'HOME' not in os.environ",
        seconds=20,
    )
    assert result.outcome == "finished" and result.output == "3.141592653589793 x\n"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "exited with 0 before its end"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(): f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
    ],
)
def test_failures_are_named(program: str, reason: str) -> None:
    """An exception, a syntax error, and leaving before the tests at the end have run."""
    result = limited(program, seconds=20)
    assert result.outcome == "failed" and result.reason.startswith(reason)


def test_endless_loop() -> None:
    """Stopped at its time."""
    assert limited("while True: pass", seconds=1)[:2] == ("time", "stopped after 1 s")


def test_endless_output() -> None:
    """Stopped at its bytes, of which the first are kept."""
    result = limited("while True: print('ab')", seconds=10, output=1000)
    assert result.outcome == "output" and result.output.startswith("ab\nab\n") and len(result.output) == 1000


def test_ten_gigabytes() -> None:
    """Only the program runs out of memory."""
    result = limited("x = bytearray(10 << 30)", seconds=20)
    assert result.outcome == "failed" and result.reason.startswith("MemoryError")


@pytest.mark.parametrize("call", ["os.fork()", "ctypes.CDLL(None).fork()"])
def test_fork_bomb(call: str) -> None:
    """Its processes are limited in number, and all are gone when the result is there."""
    before = _processes()
    result = limited(f"import os, ctypes\nwhile True:\n  try: {call}\n  except OSError: pass", seconds=2)
    assert result.outcome in ("time", "killed")
    _gone(before)


def test_what_leaves_its_group_dies_too() -> None:
    """A grandchild in a session of its own does not outlive the program."""
    before = _processes()
    result = limited(
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(99)\ntime.sleep(0.2)", seconds=20
    )
    if "processes apart" in result.missing:
        pytest.skip("the kernel gives no process namespace here")
    _gone(before)


def _processes() -> set[int]:
    """Python processes of the sandbox, of any parent."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"sandboxed.py" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def _gone(before: set[int]) -> None:
    end = time.monotonic() + 5
    while _processes() - before and time.monotonic() < end:
        time.sleep(0.05)
    assert not _processes() - before


def test_a_file_outside(tmp_path: Path) -> None:
    """Neither written nor read, by name or through a link."""
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    for program in (
        f"open({str(secret)!r}, 'w').write('x')",
        f"print(open({str(secret)!r}).read())",
        f"import os\nos.symlink({str(secret)!r}, 'link')\nprint(open('link').read())",
        f"import os\nos.remove({str(secret)!r})",
    ):
        result = limited(program, seconds=20)
        if "files apart" in result.missing:
            pytest.skip("the kernel has no Landlock here")
        assert result.outcome == "failed" and result.reason.startswith("PermissionError"), program
        assert "s3cret" not in result.output
    assert secret.read_text() == "s3cret"


def test_a_large_file() -> None:
    """A file stops at its limit."""
    result = limited("with open('a', 'wb') as f:\n  while True: f.write(bytes(1 << 20))", seconds=20)
    assert result.outcome in ("failed", "killed")


def test_network() -> None:
    """A listener on this machine is not reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = limited(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", seconds=20)
    if "no network" in result.missing:
        pytest.skip("the kernel gives no network namespace here")
    assert result.outcome == "failed" and "OSError" in result.reason, result.reason


@pytest.mark.parametrize("target", ["os.getppid()", "0", "-1", "TESTS"])
def test_signals_reach_nobody_else(target: str) -> None:
    """To its parent, its group, everybody, and to the process that runs these tests: they and a bystander live on."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        target = target.replace("TESTS", str(os.getpid()))
        result = limited(f"import os, signal, time\nos.kill({target}, signal.SIGKILL)\ntime.sleep(0.3)", seconds=20)
        assert result.outcome in ("failed", "killed", "finished")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_nothing_outlives_the_process_that_asked() -> None:
    """Killed with SIGKILL while a program waits: it and its guard are gone, too."""
    before = _processes()
    code = "from nanojax.evaluate import sandbox; sandbox.run('import time; time.sleep(60)', 60)"
    asking = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    end = time.monotonic() + 20
    while len(_processes() - before) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(_processes() - before) == 2
    asking.kill()
    asking.wait()
    _gone(before)
