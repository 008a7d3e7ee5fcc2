"""A run of two processes: the losses of one, checkpoints that go on anywhere, and one line each when a process ends."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_run
from helpers.paths import ROOT

from nanojax.cli import UserError
from nanojax.data import loader, prepare
from nanojax.run import exits, guard, metrics, processes, run_folder, watch
from nanojax.run.exits import Failed
from nanojax.run.meeting import Place, Wire

compile_cache = tiny_run.compile_cache
home = tiny_run.home
LONG: dict[str, Any] = dict(
    train__steps=5000, eval__every=0, checkpoint__every=20, eval__sample_tokens=0, train__tensorboard="false"
)


# -- what the processes say to each other, without jax -----------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[processes.Group, processes.Group]]:
    """Process 0 and process 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        ends = server.accept()[0], one
    wires = [Wire(end, f"host{1 - i}") for i, end in enumerate(ends)]
    groups = [
        processes.Group(Place("here", 1, 2, i, None), {1 - i: wire}, threading.Event()) for i, wire in enumerate(wires)
    ]
    yield groups[0], groups[1]
    for group in groups:
        group.left.set()  # otherwise its threads would end the process, which is that of the tests
    for wire, group in zip(wires, groups):
        wire.close()
        group.threads[0].join()


def test_orders_come_in_order_and_a_signal_goes_up(pair: tuple[processes.Group, processes.Group]) -> None:
    """Process 1 is told each thing once; a signal that it gets stops process 0, which tells it to leave long work, too."""
    zero, one = pair
    for what in ("step", "gather"):
        zero.order(what)
    assert [one.next(), one.next()] == [["step"], ["gather"]]
    assert zero.shared({"position": 3}) == one.shared(None) == {"position": 3}
    one.stop.set()
    zero.order("step")
    assert one.next() == ["step"] and zero.stop.wait(5)
    for group in pair:
        with pytest.raises(guard.AskedToStop):
            group.alive(watch.Watch(Path(), 0))


def test_what_must_be_the_same(pair: tuple[processes.Group, processes.Group]) -> None:
    """Equal data pass. Other data: process 0 says whose; it ends with that line, and process 1 ends with it, too."""
    zero, one = pair

    def compared(mine: str) -> None:
        with contextlib.suppress(Failed):
            one.same("data", mine)

    for mine, said in (("abc", None), ("xyz", r"process 1 on host1 has other data \(xyz\) than process 0 \(abc\)")):
        answer = threading.Thread(target=compared, args=(mine,), daemon=True)
        answer.start()
        with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
            zero.same("data", "abc")
        if said:
            zero.code = exits.MISTAKE
            zero.left.set()
            zero.wires[1].send("end", exits.MISTAKE, said)
        answer.join()
    with pytest.raises(Failed, match="process 0 on host0: process 1 on host1 has other data") as error:
        one.check()
    assert error.value.code == exits.MISTAKE


@pytest.mark.parametrize(
    "said,text,code",
    [
        (("end", exits.DIVERGED, "step 3: loss is nan"), "process 1 on host1: step 3: loss is nan", exits.DIVERGED),
        (None, "process 1 on host1 is gone; start all again", exits.FAILED_UNSAVED),
    ],
)
def test_process_0_ends_when_another_does(
    pair: tuple[processes.Group, processes.Group], said: tuple | None, text: str, code: int
) -> None:
    """With what that one said and its code; with a line of its own where the connection only ended."""
    zero, one = pair
    if said:
        one.wires[0].send(*said)
    one.left.set()
    one.wires[0].close()
    while not zero.ended:
        time.sleep(0.01)
    with pytest.raises(Failed, match=text) as error:
        zero.order("step")
    assert error.value.code == code and zero.cuts_off(ValueError())


def test_each_reads_its_own_rows(home: Path) -> None:
    """Two processes' rows together are a batch of one; position and state are those of all rows, also after a restart."""
    make = lambda: loader.train_iterator(home / "data", 8, 32, 0, 300)
    whole, parts = make(), [make(), make()]
    for part, own in zip(parts, (range(6), range(6, 8))):
        loader.share(part, own)
    for again in (False, True):
        if again:
            for part in parts:
                part.set_state(whole.get_state())
        for _ in range(40):  # over the end of a pass
            np.testing.assert_array_equal(np.concatenate([next(part) for part in parts]), next(whole))
        assert [part.position for part in parts] == [whole.position] * 2
    assert parts[1].get_state()["position"] == whole.get_state()["position"]


# -- processes that train ----------------------------------------------------------------------------------------------


class Started:
    """Two processes with two devices each, of one run; `ends` waits and gives the exit code and the output of each."""

    def __init__(self, home: Path, run: Path, cache: Path, before: list[list[str]] | None = None, **overrides: Any):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        keys: dict[str, Any] = dict(train__microbatch=1, parallel__coordinator=place, parallel__processes=2)
        keys |= {"parallel__wait": 120, **overrides}
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
        self.both: list[subprocess.Popen[str]] = []
        for i in range(2):
            own = {key: value[i] if isinstance(value, tuple) else value for key, value in keys.items()}
            folder = run if i == 0 else run.with_name("not_there")
            arguments = tiny_run.arguments(home / "tiny.py", folder, **own, parallel__process=i)
            command = [*(before[i] if before else []), sys.executable, "-m", "nanojax.train", *arguments]
            pipe = subprocess.PIPE
            self.both.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True))

    def ends(self, seconds: float = 300) -> list[tuple[int, str]]:
        """(exit code, output) of each, within so many seconds."""
        end = time.monotonic() + seconds
        try:
            out = [process.communicate(timeout=end - time.monotonic())[0] for process in self.both]
        finally:
            for process in self.both:
                process.kill()
        return [(process.returncode, text) for process, text in zip(self.both, out)]

    def wait_for(self, condition: Any) -> None:
        tiny_run.wait_for(self.both[0], condition)


def _is_named() -> bool:
    try:
        return bool(socket.gethostbyname(socket.gethostname()))
    except OSError:
        return False


named = pytest.mark.skipif(not _is_named(), reason="gloo finds this host by its own name, which is not known here")


@named
@pytest.mark.long
def test_two_processes_are_one_run(home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """20 steps of 2 processes with 2 devices each have the losses of one device (1e-6) and its validation. From step 9 on, two
    processes again are bit for bit the whole run; one process with one device says that it is not, and stays within 1e-6."""
    kept: dict[str, Any] = dict(checkpoint__keep_last=9, train__steps=20)
    two, one = tmp_path / "two", tmp_path / "one"
    (code, said), (other, little) = Started(home, two, compile_cache, **kept).ends()
    assert code == other == 0, said + little
    assert "compiling for 4 x cpu" in said and "done, 20 steps" in said
    waits, *little = little.splitlines()
    assert (
        "waiting up to" in waits
        and little == ["process 1: compiling for cpu ..."]
        and not (tmp_path / "not_there").exists()
    )
    process = tiny_run.spawn(home / "tiny.py", one, compile_cache, train__microbatch=1, **kept)
    assert "done, 20 steps" in process.communicate()[0]
    np.testing.assert_allclose(tiny_run.losses(two), tiny_run.losses(one), rtol=1e-6)
    bits = lambda run: [r["bpb"] for r in metrics.read(run, "eval")]
    np.testing.assert_allclose(bits(two), bits(one), rtol=1e-6)
    assert tiny_run.saved(two)[2]["position"] == tiny_run.saved(one)[2]["position"]
    assert tiny_run.saved(two)[1].keys() == {k for k in tiny_run.saved(one)[1] if not k.startswith(".accum")}

    again = tiny_run.cut_after(two, tmp_path / "again", 9)
    (code, said), _ = Started(home, again, compile_cache, **kept).ends()
    assert code == 0 and "resuming after step 9" in said and "bit for bit" not in said
    tiny_run.assert_same_run(two, again)

    fewer = tiny_run.cut_after(two, tmp_path / "fewer", 9)
    process = tiny_run.spawn(home / "tiny.py", fewer, compile_cache, train__microbatch=1, **kept)
    said = process.communicate()[0]
    assert "parallel.devices (was 4, now 1), parallel.processes (was 2, now 1): from step 10 on not bit for bit" in said
    np.testing.assert_allclose(tiny_run.losses(fewer), tiny_run.losses(two), rtol=1e-6)


@named
@pytest.mark.long
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other(killed: int, home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """Within 15 s, with one line and code 6; the last checkpoint is whole, and the same commands go on from it bit for bit."""
    run = tmp_path / "run"
    started = Started(home, run, compile_cache, **LONG)
    started.wait_for(lambda: len(run_folder.available(run)) >= 2)
    started.both[killed].kill()
    ended = started.ends(15)
    code, said = ended[1 - killed]
    lines = [line for line in said.splitlines() if "error" in line or "***" in line or "@ " in line]
    assert code == exits.FAILED_UNSAVED and ended[killed][0] == -signal.SIGKILL
    assert len(lines) == 1 and f"process {killed} on " in lines[0] and "is gone; start all again" in lines[0], said
    before = {r["step"]: r["loss"] for r in metrics.read(run, "train")}

    whole = max(run_folder.available(run))
    again = Started(home, run, compile_cache, **LONG)
    again.wait_for(lambda: max(run_folder.available(run)) >= whole + 20)
    again.both[1 - killed].send_signal(signal.SIGTERM)
    (code, said), (other, _) = again.ends()
    assert code == other == exits.STOPPED and f"resuming after step {whole}" in said
    after = {r["step"]: r["loss"] for r in metrics.read(run, "train")}
    assert set(before) <= set(after) and all(after[step] == loss for step, loss in before.items())
    assert max(run_folder.available(run)) == max(after)  # both stopped at one step, and it is saved


@named
@pytest.mark.long
def test_mistakes_end_both(home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """Other data, other settings, no data, devices that cannot be: one line in each, code 2, and nothing is compiled."""
    other = tmp_path / "other"
    held_out = ["--vocab", "300", "--valid", "hash:0.4", "--workers", "1"]
    prepare.main(["--input", str(home / "texts"), "--out", str(other), *held_out])
    mistakes: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("data", dict(data__path=(home / "data", other)), "process 1 on .* has other data"),
        ("seed", dict(train__seed=(0, 1)), r"has other settings \(train.seed=1\) than process 0 \(train.seed=0\)"),
        ("gone", dict(data__path=(home / "nowhere", home / "data")), "no data folder there"),
        ("size", dict(parallel__devices=3), "does not divide the step's 4 microbatches"),
    )
    for name, keys, said in mistakes:
        ended = Started(home, tmp_path / name, compile_cache, **keys).ends()
        for code, text in ended:
            assert code == exits.MISTAKE and "compiling" not in text
            told = [line for line in text.splitlines() if "waiting up to" not in line]
            assert len(told) == 1 and told[0].startswith("error: ") and re.search(said, told[0]), text


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Two hosts with a cable between them: the commands that run something on each."""
    names, sh = ("nanojax-a", "nanojax-b"), lambda text: subprocess.run(text.split(), check=True, capture_output=True)
    folder = [Path("/etc/netns") / name for name in names]
    try:
        for name in names:
            sh(f"ip netns add {name}")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here ({error})")
    try:
        sh("ip link add nanojax-a type veth peer name nanojax-b")
        for i, name in enumerate(names):
            sh(f"ip link set {name} netns {name}")
            sh(f"ip -n {name} addr add 10.77.7.{i + 1}/24 dev {name}")
            for link in (name, "lo"):
                sh(f"ip -n {name} link set {link} up")
            folder[i].mkdir(parents=True)
            (folder[i] / "hosts").write_text("127.0.0.1 localhost\n10.77.7.1 nanojax-a\n10.77.7.2 nanojax-b\n")
        named = 'hostname "$0"; exec "$@"'
        yield [["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, name] for name in names]
    finally:
        for i, name in enumerate(names):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(folder[i], ignore_errors=True)


@pytest.mark.slow
def test_two_hosts(home: Path, tmp_path: Path, compile_cache: Path, hosts: list[list[str]]) -> None:
    """Each has its data in a folder of its own; they train together, and when the cable is pulled both end within 60 s."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(home / "data", other)
    keys: dict[str, Any] = {"data__path": (home / "data", other), "parallel__coordinator": "nanojax-a:4321"}
    started = Started(home, run, compile_cache, before=hosts, **LONG, **keys)
    started.wait_for(lambda: len(run_folder.available(run)) >= 2)
    subprocess.run(["ip", "-n", "nanojax-b", "link", "set", "nanojax-b", "down"], check=True)
    for i, (code, said) in enumerate(started.ends(60)):
        assert code == exits.FAILED_UNSAVED, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert f"process {1 - i} on " in line and "done" not in said
