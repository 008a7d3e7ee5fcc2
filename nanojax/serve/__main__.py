"""Serves a run to OpenAI's clients and to a browser.        python -m nanojax.serve --run=runs/d24-chat"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from nanojax import cli
from nanojax.cli import Parser, UserError, run_main

try:
    import uvicorn
    from starlette.applications import Starlette

    from nanojax.serve import app, metrics, scheduler
    from nanojax.serve.connection import Connection
except ImportError as error:
    if (error.name or "").startswith("nanojax"):
        raise

    def _absent() -> None:
        raise UserError("the server's packages are not installed: pip install -e '.[serve]'")

    if __name__ == "__main__":
        run_main(_absent)
    raise

import jax

from nanojax import xla
from nanojax.chat import BASE, untrained
from nanojax.engine.slots import Slots
from nanojax.run import checkpoint, exits, run_folder

LAST_WORDS = 5  # seconds in which cut answers may be told so
LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def main() -> None:
    """The command."""
    a = _parser().parse_args()
    _check(a)
    key = _key(a.api_key_file)
    loopback = _is_loopback(a.host)
    if not loopback and key is None and not a.without_key:
        raise UserError(
            f"--host={a.host}: others could reach the server; give --api-key-file, or --without-key to let anybody ask"
        )
    run_folder.check_path(Path(a.run))
    if not run_folder.available(a.run):
        run_folder.read_config(a.run)  # for its error where this is no run folder
        raise UserError(f"{a.run}: no checkpoint yet; train until the first one is saved")
    listening = _listen(a.host, a.port)
    xla.configure()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    name = a.name or Path(a.run).resolve().name
    hosts = LOOPBACK | {a.host.lower()} if loopback else None
    service = app.Service(name, metrics.Metrics(), a.tokens, a.timeout, key=key, hosts=hosts)
    server = Server(app.make(service), service, a.grace)
    loading = threading.Thread(target=server.load, args=[a], daemon=True)
    loading.start()
    code = server.serve_until_stopped(listening)
    if loading.is_alive():  # compiled code under way would abort the process when Python takes the thread away
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Server(uvicorn.Server):
    """uvicorn with a model that is loaded while it listens, and an exit code."""

    def __init__(self, application: Starlette, service: app.Service, grace: int):
        super().__init__(
            uvicorn.Config(
                application, http=Connection, log_level="warning", access_log=False, server_header=False, lifespan="off",
                ws="none", timeout_graceful_shutdown=grace + LAST_WORDS, timeout_keep_alive=30,
                h11_max_incomplete_event_size=65536,
            )
        )  # fmt: skip
        self.service, self.grace = service, grace
        self.mistake: BaseException | None = None

    def load(self, a: Any) -> None:
        """Loads the model, compiles its programs and begins to answer. Stops the server where that fails."""
        try:
            dtype = a.dtype or ("f32" if jax.default_backend() == "cpu" else "stored")
            config, params, tokenizer = checkpoint.load_params(a.run, None if dtype == "stored" else dtype, a.step)
            self.service.chat = not untrained(config, params, tokenizer)
            if not self.service.chat and not a.base:
                raise UserError(f"{a.run}: {BASE}; --base serves it all the same, for /v1/completions alone")
            context = min(a.context or config.model.T, config.model.T)
            self.service.tokens = min(self.service.tokens, context)
            if a.context and a.context > context:
                print(f"--context={a.context}: the model reads {context} tokens, so these it is", file=sys.stderr)
            ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
            call = tokenizer.special("<|python_end|>")
            slots = Slots(
                config, params, a.rows, context, tokenizer.vocab_size, ends, call, int8_cache=a.cache == "int8"
            )
            slots.compile()
            self.service.tokenizer = tokenizer
            self.service.scheduler = scheduler.Scheduler(slots, ends, a.queue, self.service.metrics)
            self.service.scheduler.start()
            print(f"ready: {self.service.model}, rows of {context} tokens: {a.rows}", file=sys.stderr, flush=True)
        except BaseException as error:
            self.mistake = error
            self.should_exit = True

    def serve_until_stopped(self, listening: socket.socket) -> int:
        """The exit code."""
        host, port = listening.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        # uvicorn takes signals a moment later, and raises what it has obeyed again in the end: both are ours.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        print(f"http://{where}:{port} (loading)", file=sys.stderr, flush=True)
        self.run([listening])
        if self.mistake is not None:
            raise self.mistake
        served = self.service.scheduler
        if served is None:
            return exits.DONE
        served.close()
        if served.failed:
            return exits.FAILED
        return exits.STOPPED if self.service.cut else exits.DONE

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On a signal: new requests are refused from now on, and what is not written within the grace is cut."""
        self.service.closing = True
        if self.service.scheduler is not None:
            cut = threading.Timer(self.grace, self.service.scheduler.close)
            cut.daemon = True
            cut.start()
        super().handle_exit(sig, frame)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m nanojax.serve",
        description="Serves a trained run: a page for a browser, and OpenAI's API under /v1 for its clients.",
        examples="  python -m nanojax.serve --run=runs/d24-chat\n"
        "  python -m nanojax.serve --run=runs/d24-chat --host=0.0.0.0 --api-key-file=key.txt\n"
        "  python -m nanojax.serve --run=runs/d20 --base --rows=32\n",
    )
    add = parser.add_argument
    add("--run", type=cli.path, required=True, help="run folder")
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, help="0 = any that is free (8000)")
    add("--api-key-file", type=cli.path, help="a file with the key that clients must give")
    add("--without-key", action="store_true", help="other machines may ask without a key")
    add("--name", help="the model's name (the run folder's)")
    add("--base", action="store_true", help="serves a model that was not trained to chat, for /v1/completions alone")
    add("--rows", type=int, default=8, help="answers that are written together (8)")
    add("--context", type=int, help="tokens of a conversation at most (the model's sequence)")
    add("--tokens", type=int, default=1024, help="of an answer at most (1024)")
    add("--queue", type=int, default=64, help="answers that may wait; beyond, requests get 429 (64)")
    add("--timeout", type=float, default=600.0, help="seconds that a request may take (600)")
    add("--grace", type=int, default=8, help="seconds that answers have to end when the server is stopped (8)")
    add("--step", type=int, help="a checkpoint's step; default: the newest")
    add("--dtype", choices=[*checkpoint.DTYPES, "stored"], help="default: f32 on a CPU, else as trained")
    add("--cache", choices=["float", "int8"], default="float", help="keys and values (float)")
    return parser


def _check(a: Any) -> None:
    """UserError names the first option that is out of range."""
    good = {
        "port": 0 <= a.port < 2**16,
        "rows": 1 <= a.rows <= 1024,
        "context": a.context is None or a.context >= 64,
        "tokens": a.tokens >= 1,
        "queue": 1 <= a.queue <= 10**6,
        "grace": 0 <= a.grace < 10**6,
        "timeout": 0 < a.timeout < 1e7,
    }
    for name, fine in good.items():
        if not fine:
            raise UserError(f"--{name}={getattr(a, name)}: out of range; see --help")


def _key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        key = Path(path).read_text("ascii").strip()
    except UnicodeDecodeError:
        raise UserError(f"{path}: a key has ASCII characters only") from None
    if len(key) < 8 or not key.isprintable() or " " in key:
        raise UserError(f"{path}: must hold one key of at least 8 characters, without spaces")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot listen there ({error.strerror}); choose another"
        ) from None


if __name__ == "__main__":
    run_main(main)
