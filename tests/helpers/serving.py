"""A server in a thread of this process, over a tiny model or over an engine that says what it is told."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import uvicorn

from nanojax import config as configs
from nanojax import config_rules, model
from nanojax.engine.choose import Choice
from nanojax.engine.slots import TOP, Scores, Slots, Written
from nanojax.serve import app
from nanojax.serve.connection import Connection
from nanojax.serve.metrics import Metrics
from nanojax.serve.scheduler import Scheduler
from nanojax.tokenizer import Tokenizer

TOKENIZER = Tokenizer([*(bytes([b]) for b in range(256)), "é".encode(), "日".encode()[:2], b" the", b"ST", b"OP"])
ENDS = (TOKENIZER.special("<|assistant_end|>"), TOKENIZER.bos)
CALL = TOKENIZER.special("<|python_end|>")


def slots(rows: int, seq: int = 192, **sizes: Any) -> Slots:
    """Slots of a tiny model, their programs compiled."""
    config, params = random_model(seq, **sizes)
    made = Slots(config, params, rows, seq, TOKENIZER.vocab_size, ENDS, CALL)
    made.compile()
    return made


def random_model(seq: int, **sizes: Any) -> tuple[configs.Config, Any]:
    """A tiny model of random parameters whose likeliest token is never an end."""
    sizes = dict(depth=2, width=64, head_dim=32, vocab=TOKENIZER.vocab_size, seq=seq) | sizes
    config = config_rules.resolve(
        configs.Config(
            name="tiny",
            model=configs.Model(**sizes),
            compute=configs.Compute(loss_chunk=16),
            train=configs.Train(tokens_per_step=2 * seq, microbatch=2),
        )
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes)
    params["head"] = params["head"].at[np.array(ENDS)].set(0.0)
    return config, params


class Scripted:
    """An engine whose answer to a prompt is what `reply` says, one token per step of `pause` seconds."""

    def __init__(self, reply: Callable[[Sequence[int]], Sequence[int]], count: int = 4, context: int = 4096):
        self.reply, self.count, self.context, self.pause = reply, count, context, 0.0
        self.rows: list[list[int]] = [[] for _ in range(count)]
        self.forced: list[list[int]] = [[] for _ in range(count)]
        self.new = [0] * count

    def common(self, slot: int, prompt: Sequence[int]) -> int:
        return 0

    def read(self, slot: int, prompt: Sequence[int], done: int, scored: bool = False) -> tuple[int, Scores | None]:
        count = min(256, len(prompt) - 1 - done)
        return done + count, self._scores(count) if scored else None

    def begin(
        self, slot: int, prompt: Sequence[int], new: int, choice: Choice, seed: int, sample: int = 0, scored: bool = False
    ) -> None:  # fmt: skip
        self.rows[slot], self.forced[slot], self.new[slot] = list(self.reply(prompt)), [], new

    def force(self, slot: int, tokens: Sequence[int]) -> None:
        self.forced[slot] = list(tokens)

    def end(self, slot: int) -> None:
        self.rows[slot] = []

    def step(self, limit: int = 1) -> Written:
        time.sleep(self.pause)
        tokens, forced = np.full((1, self.count), -1, np.int32), np.zeros((1, self.count), bool)
        for slot in range(self.count):
            queue = self.forced[slot] or self.rows[slot]
            if queue and self.new[slot]:
                forced[0, slot] = queue is self.forced[slot]
                tokens[0, slot] = queue.pop(0)
                self.new[slot] -= 1
        zeros = Scores(*(np.zeros((1, self.count, *a.shape[1:]), a.dtype) for a in self._scores(1)))
        return Written(tokens, forced, zeros)

    def _scores(self, count: int) -> Scores:
        return Scores(np.zeros(count), np.zeros((count, TOP)), np.zeros((count, TOP), int))


def service_of(engine: Any, queue: int = 64, tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> app.Service:
    """A service over an engine, its scheduler running."""
    service = app.Service("tiny", Metrics(), tokenizer=tokenizer, **settings)
    ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    service.scheduler = Scheduler(engine, ends, queue, service.metrics)
    service.scheduler.start()
    return service


@contextlib.contextmanager
def served(service: app.Service) -> Iterator[str]:
    """The address of a server that runs until the block ends."""
    config = uvicorn.Config(
        app.make(service), http=Connection, port=0, log_level="error", lifespan="off", ws="none", access_log=False
    )
    server = uvicorn.Server(config)
    config.timeout_graceful_shutdown = 5
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        _stop(service, server, thread)


def _stop(service: app.Service, server: uvicorn.Server, thread: threading.Thread) -> None:
    if service.scheduler:
        service.scheduler.close()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
