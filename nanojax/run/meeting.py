"""How the processes of a run meet: where, who is missing, and what must be the same in all of them, before jax starts.

jax.distributed ends a process that cannot join with a dump of its stack. So process 0 calls the roll itself, over TCP: what is
wrong is told to everyone in one line, and jax.distributed begins only when all are there.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

import nanojax
from nanojax import config as configs
from nanojax.cli import UserError, first_line
from nanojax.config import Config
from nanojax.run import exits

LONGEST_LINE = 1 << 20  # bytes
HELLO_SECONDS = 10.0  # for what connects to say who it is
# Where a cable is pulled or a machine loses its power, the kernel gives a connection up after so many seconds.
SILENT_SECONDS = 30
OWN_KEYS = ("parallel.coordinator", "parallel.process")  # beside paths: what each process has of its own


class Place(NamedTuple):
    """Where the processes meet and which one this is. devices: of this machine, the ones it may use; None = all."""

    host: str
    port: int
    processes: int
    number: int
    devices: list[int] | None

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Wire:
    """A connection that carries JSON, one value a line."""

    def __init__(self, connection: socket.socket, host: str = ""):
        self.connection, self.host = connection, host
        self.lines = connection.makefile("rb")
        self.lock = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        each = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": SILENT_SECONDS * 1000}
        for option, value in each.items():
            if hasattr(socket, option):  # Linux has them all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, *message: Any) -> None:
        """One message. Of a connection that is gone nothing is said here: `receive` tells it."""
        with self.lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """The next message; None once there will be no more, or what came is none."""
        try:
            message = json.loads(self.lines.readline(LONGEST_LINE))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, list) and message else None

    def close(self) -> None:
        """Ends the connection, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.lines.close()
        self.connection.close()


def place(config: Config) -> Place:
    """Where the config's processes meet. UserError for keys that do not name it."""
    p = config.parallel
    key = f"--parallel.coordinator={p.coordinator}"
    if p.coordinator == "auto":
        return _of_environment(key, p.processes, p.wait)
    host, _, port = p.coordinator.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{key}: expected HOST:PORT of process 0, or auto")
    if p.processes < 2:
        raise UserError(f"{key}: set --parallel.processes to how many processes there are in all")
    if p.process >= p.processes:
        raise UserError(
            f"--parallel.process={p.process}: the {p.processes} processes have the numbers 0 to {p.processes - 1}"
        )
    return Place(host.strip("[]"), int(port), p.processes, p.process, None)


def _of_environment(key: str, processes: int, wait: float) -> Place:
    """As SLURM, Open MPI, or what else jax.distributed knows has started this process."""
    from jax._src import clusters  # what jax.distributed.initialize() without arguments reads; it has no public name

    try:
        detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
        address, count, number, devices = detect(None, None, None, None, None, int(wait))
    except Exception as error:  # of several types: whatever an environment lacks
        raise UserError(f"{key}: the environment cannot be read ({first_line(error)})") from None
    if address is None or count is None or number is None:
        raise UserError(f"{key}: neither SLURM nor Open MPI has started this process; give HOST:PORT of process 0")
    if processes not in (1, count):
        raise UserError(f"--parallel.processes={processes}: the environment says {count}; leave it out")
    host, _, port = address.rpartition(":")
    return Place(host.strip("[]"), int(port), count, number, list(devices) if devices is not None else None)


def facts(config: Config, by_hand: frozenset[str]) -> dict[str, Any]:
    """What must be the same in all processes.

    Of a run that begins from another one only the keys of the command line, since others may come from its run folder, which
    process 0 alone has.
    """
    keys = {name: str(key.value) for name, key in configs.keys(config).items() if name not in configs.paths()}
    asked = keys.keys() & by_hand if config.train.init else keys.keys()
    settings = {name: keys[name] for name in sorted(asked) if name not in OWN_KEYS}
    return {"jax": jax.__version__, "sources of nanojax": _code(), "settings": settings}


def _code() -> str:
    """A hash of the package's sources."""
    package = Path(nanojax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def met(where: Place, mine: dict[str, Any], wait: float) -> tuple[dict[int, Wire], int]:
    """Connections by the number of the process at their other end, and the port that jax.distributed shall have.

    Process 0 has one to each other, the others have one to process 0. UserError, in all of them, when somebody is missing or
    something differs.
    """
    return _roll_call(where, mine, wait) if where.number == 0 else _answered(where, mine, wait)


def _roll_call(where: Place, mine: dict[str, Any], wait: float) -> tuple[dict[int, Wire], int]:
    wires: dict[int, Wire] = {}
    end = time.monotonic() + wait
    with _listening(where) as listener:
        others = "1" if where.processes == 2 else f"1 to {where.processes - 1}"
        print(f"waiting up to {wait:g} s at {where.address} for process {others} of {where.processes}", flush=True)
        try:
            while len(wires) < where.processes - 1:
                number, wire, theirs = _next(where, listener, wires, end, wait)
                wires[number] = wire
                compare(number, wire.host, mine, theirs)
        except UserError as error:
            for wire in wires.values():
                wire.send("end", exits.MISTAKE, str(error))
                wire.close()
            raise
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    for wire in wires.values():
        wire.send("all are here", port)
    return wires, port


def _listening(where: Place) -> socket.socket:
    """The open port. UserError where it is taken, or the coordinator's host is not this one."""
    key = f"--parallel.coordinator={where.address}"
    try:
        family, *_, own = socket.getaddrinfo(where.host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(own)
    except socket.gaierror as error:
        raise UserError(f"{key}: no such host ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"{key}: is not this machine, but --parallel.process=0 must run there") from None
        raise UserError(f"{key}: {error.strerror}") from None
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", where.port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"{key}: the port cannot be opened ({os.strerror(error.errno or 0)}); end the other process 0, or choose another port"
        ) from None


def _next(
    where: Place, listener: socket.socket, wires: dict[int, Wire], end: float, wait: float
) -> tuple[int, Wire, dict[str, Any]]:
    """(number, connection, facts) of the next process that comes. UserError if it is one too many, or nobody comes."""
    while True:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            connection, address = listener.accept()
        except TimeoutError:
            missing = ", ".join(str(i) for i in range(1, where.processes) if i not in wires)
            raise UserError(
                f"of {where.processes} processes (--parallel.processes) number {missing} did not come to {where.address} "
                f"within {wait:g} s"
            ) from None
        connection.settimeout(HELLO_SECONDS)
        wire = Wire(connection, address[0].removeprefix("::ffff:"))
        match wire.receive():
            case ["nanojax", int(number), int(count), str(host), dict(theirs)]:
                wire.host = f"{host} ({wire.host})"
            case _:  # somebody else
                wire.close()
                continue
        connection.settimeout(None)
        problem = ""
        if count != where.processes:
            problem = (
                f"--parallel.processes={count} on {wire.host}, {where.processes} on process 0: give all the same number"
            )
        elif number == 0 or number in wires:
            other = wires[number].host if number in wires else socket.gethostname()
            problem = f"--parallel.process={number} twice: on {other} and on {wire.host}"
        if problem:
            wire.send("end", exits.MISTAKE, problem)
            wire.close()
            raise UserError(problem)
        return number, wire, theirs


def _answered(where: Place, mine: dict[str, Any], wait: float) -> tuple[dict[int, Wire], int]:
    print(f"process {where.number}: waiting up to {wait:g} s for process 0 at {where.address}", flush=True)
    wire = Wire(_connected(where, wait), where.host)
    wire.send("nanojax", where.number, where.processes, socket.gethostname(), mine)
    match wire.receive():
        case ["all are here", int(port)]:
            return {0: wire}, port
        case ["end", int(), str(text)]:
            wire.close()
            raise UserError(text)
    wire.close()
    raise UserError(f"process 0 on {where.address} ended before all processes were there")


def _connected(where: Place, wait: float) -> socket.socket:
    key, end = f"--parallel.coordinator={where.address}", time.monotonic() + wait
    while True:
        try:
            connection = socket.create_connection((where.host, where.port), timeout=HELLO_SECONDS)
            connection.settimeout(None)
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()  # a port of outgoing connections, which met itself
        except socket.gaierror as error:
            raise UserError(f"{key}: no such host ({error.strerror})") from None
        except OSError as error:
            if time.monotonic() > end:
                why = error.strerror or error
                raise UserError(
                    f"{key}: process 0 did not answer for {wait:g} s ({why}); start the one with --parallel.process=0 there"
                ) from None
        time.sleep(min(0.5, wait / 10))


def compare(number: int, host: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """UserError naming what process `number` has otherwise than process 0."""
    for what, own in ours.items():
        other = theirs.get(what)
        if isinstance(own, dict) and isinstance(other, dict):
            keys = [key for key in own.keys() | other.keys() if own.get(key) != other.get(key)]
            own, other = (", ".join(f"{key}={of.get(key)}" for key in sorted(keys)[:3]) for of in (own, other))
        if own != other:
            raise UserError(
                f"process {number} on {host} has other {what} ({other}) than process 0 ({own}); make them the same"
            )
