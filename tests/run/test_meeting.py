"""How processes meet: threads call the roll over 127.0.0.1, without jax.distributed. Each mistake is one line for everyone."""

import contextlib
import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from nanojax import config as configs
from nanojax import config_rules
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.run import meeting
from nanojax.run.meeting import Place

SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[007-008]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
SLURM |= {"SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4"}
OPEN_MPI |= {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(port: int, *calls: tuple[int, int, dict[str, Any]], wait: float = 5) -> list[Any]:
    """What each process (number, processes, facts) gets of `met`: the numbers it is connected to, or its error's text."""
    got: list[Any] = [None] * len(calls)

    def one(i: int, number: int, processes: int, mine: dict[str, Any]) -> None:
        try:
            wires, of_jax = meeting.met(Place("127.0.0.1", port, processes, number, None), mine, wait)
            got[i] = sorted(wires), of_jax
            for wire in wires.values():
                wire.close()
        except UserError as error:
            got[i] = str(error)

    threads = [threading.Thread(target=one, args=(i, *call), daemon=True) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_three_meet(port: int) -> None:
    """Process 0 is connected to the others, they to it, and all are told one free port for jax. Who only knocks is ignored."""

    def knock() -> None:
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as stranger:
                return stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            time.sleep(0.01)

    stranger = threading.Thread(target=knock, daemon=True)
    stranger.start()
    zero, one, two = meet(port, (0, 3, {"a": 1}), (1, 3, {"a": 1}), (2, 3, {"a": 1}))
    stranger.join()
    assert zero[0] == [1, 2] and one[0] == two[0] == [0]
    assert zero[1] == one[1] == two[1] != port


@pytest.mark.parametrize(
    "calls,said",
    [
        ([(0, 2, {}), (1, 3, {})], r"--parallel.processes=3 on .*, 2 on process 0"),
        ([(0, 3, {}), (1, 3, {}), (1, 3, {})], r"--parallel.process=1 twice: on .* and on "),
        (
            [(0, 2, {"jax": "0.12"}), (1, 2, {"jax": "0.11"})],
            r"process 1 on .* has other jax \(0.11\) than process 0 \(0.12\)",
        ),
        ([(0, 2, {"sources": "a"}), (1, 2, {"sources": "b"})], r"has other sources \(b\) than process 0 \(a\)"),
        (
            [(0, 2, {"settings": {"train.seed": "0"}}), (1, 2, {"settings": {"train.seed": "7"}})],
            r"has other settings \(train.seed=7\) than process 0 \(train.seed=0\)",
        ),
    ],
)
def test_what_differs_is_told_to_all(port: int, calls: list[tuple[int, int, dict]], said: str) -> None:
    """The same line in process 0 and in the one that differs."""
    got = meet(port, *calls)
    assert got[0] == got[-1] and re.search(said, got[0]), got


def test_who_is_missing(port: int) -> None:
    """Process 0 says who did not come, a process whose coordinator does not answer says where, both after `wait` seconds."""
    alone = meet(port, (0, 3, {}), (2, 3, {}), wait=1)
    assert (
        alone[0]
        == alone[1]
        == f"of 3 processes (--parallel.processes) number 1 did not come to 127.0.0.1:{port} within 1 s"
    )
    (absent,) = meet(port, (1, 2, {}), wait=0.3)
    assert absent.startswith(f"--parallel.coordinator=127.0.0.1:{port}: process 0 did not answer for 0.3 s (")


def test_process_0_is_where_it_is_said_to_be(port: int) -> None:
    """A host that is another machine, one that does not exist, and a port that is taken."""
    at = lambda host: Place(host, port, 2, 0, None)
    for host, said in (("192.0.2.1", "is not this machine"), ("no-such-host.invalid", "no such host")):
        with pytest.raises(UserError, match=said):
            meeting.met(at(host), {}, 1)
    with socket.create_server(("", port)), pytest.raises(UserError, match="the port cannot be opened"):
        meeting.met(at("127.0.0.1"), {}, 1)


def of(config: Config, **keys: Any) -> Config:
    return config_rules.resolve(configs.override(config, {f"parallel.{key}": value for key, value in keys.items()}))


@pytest.mark.parametrize(
    "keys,said",
    [
        ({"coordinator": "host"}, "expected HOST:PORT of process 0, or auto"),
        ({"coordinator": "host:70000", "processes": 2}, "expected HOST:PORT of process 0, or auto"),
        ({"coordinator": "host:1"}, "set --parallel.processes to how many"),
        ({"coordinator": "host:1", "processes": 2, "process": 2}, "have the numbers 0 to 1"),
        ({"coordinator": "auto"}, "neither SLURM nor Open MPI has started this process"),
    ],
)
def test_keys_that_name_no_place(tiny: Callable[..., Config], keys: dict[str, Any], said: str) -> None:
    """One line that says what to give."""
    with pytest.raises(UserError, match=said):
        meeting.place(of(tiny(), **keys))


def test_the_environment_says_it(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: host, number and devices from SLURM's or Open MPI's variables; all devices unless a number is given."""
    config = of(tiny(), coordinator="auto")
    assert config.parallel.devices == "all" and of(tiny(), coordinator="auto", devices="2").parallel.devices == "2"
    with monkeypatch.context() as patch:
        for name, value in SLURM.items():
            patch.setenv(name, value)
        where = meeting.place(config)
        assert where == Place("node007", 65535 - 4095 + 1, 2, 1, [0])
        with pytest.raises(UserError, match=r"--parallel.processes=3: the environment says 2"):
            meeting.place(of(tiny(), coordinator="auto", processes=3))
    with monkeypatch.context() as patch:
        for name, value in OPEN_MPI.items():
            patch.setenv(name, value)
        where = meeting.place(config)
        assert (where.host, where.processes, where.number, where.devices) == ("10.96.0.1", 4, 3, [1])


def test_what_each_has_of_its_own(tiny: Callable[..., Config]) -> None:
    """Paths, number and address may differ; nothing else, but of a run from another one what nobody typed."""
    config = of(tiny(), coordinator="a:1", processes=2)
    train, data = dataclasses.replace(config.train, run="elsewhere"), dataclasses.replace(config.data, path="there")
    other = dataclasses.replace(of(config, coordinator="b:1", process=1), train=train, data=data)
    alike = lambda a, b, *typed: meeting.facts(a, frozenset(typed)) == meeting.facts(b, frozenset(typed))
    assert alike(config, other) and not alike(config, of(config, wait=2))
    tuned = [
        dataclasses.replace(c, train=dataclasses.replace(c.train, init="base")) for c in (config, of(config, wait=2))
    ]
    assert alike(*tuned) and not alike(*tuned, "parallel.wait")
