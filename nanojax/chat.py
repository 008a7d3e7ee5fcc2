"""A conversation with a trained run in the terminal: answers stream, and the cache stays between turns.

python -m nanojax.chat --run=runs/d24-chat
"""

import codecs
import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanojax import cli, conversation, model, xla
from nanojax.cli import Parser, UserError, run_main
from nanojax.config import Config
from nanojax.engine import decode
from nanojax.engine.choose import Choice
from nanojax.engine.generate import Calculator, Decoder, check
from nanojax.run import checkpoint
from nanojax.tokenizer import SPECIAL_TOKENS, Tokenizer

HELP = """\
/again        answers the last message anew
/edit TEXT    replaces the last message by TEXT
/new          forgets the conversation
/help         this list
/quit         leaves, as Ctrl-D does; Ctrl-C stops an answer"""
SHOWN = {"<|python_start|>": "[", "<|python_end|>": "", "<|output_start|>": " = ", "<|output_end|>": "]"}
BASE = "this model was not trained to chat: it continues text, and what follows is no answer"
# A terminal obeys these; text has no use for them.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How answers are drawn. tokens: of an answer, at most. int8_cache: keys and values as codes."""

    choice: Choice
    tokens: int = 256
    seed: int = 0
    int8_cache: bool = False


class Turn(NamedTuple):
    """A message, and where it begins among the conversation's tokens."""

    text: str
    begin: int


class Chat:
    """A conversation: its tokens as they were written, and a cache of as many of them as are in it."""

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, options: Options):
        self.config, self.params, self.tokenizer, self.options = config, params, tokenizer, options
        self.end = tokenizer.special("<|assistant_end|>")
        self.cache = decode.empty_cache(config, config.model.T, options.int8_cache)
        windowed = {kept.shape[2] for layer in self.cache for kept in layer}
        self.rewinds = len(windowed) == 1 and windowed.pop() >= config.model.T
        self.cached: list[int] = []
        self.answers = 0
        self.new()

    def new(self) -> None:
        """Forgets the conversation. The cache stays, for what the next one has in common with it."""
        self.tokens: list[int] = []
        self.turns: list[Turn] = []

    def answer(self, text: str, stop: threading.Event) -> Generator[list[int], None, None]:
        """Tokens of the answer to a message, some at a time, until it ends, is full, or `stop` is set.

        UserError, with the conversation as it was, if it leaves no room.
        """
        asked = conversation.render_for_completion(self.tokenizer, [{"role": "user", "content": text}])
        prompt = [*self.tokens, *(asked[1:] if self.tokens else asked)]
        try:
            check(self.config, prompt, 1)
        except UserError as error:
            raise UserError(f"{error}; /new begins another conversation" if self.turns else str(error)) from None
        self.turns.append(Turn(text, len(self.tokens)))
        decoder, written = self._read(prompt), []
        self.tokens = prompt
        try:
            for block in decoder.blocks(live=True):
                new = block.tokens[:, 0].tolist()
                written += new
                yield new
                if stop.is_set():
                    break
        finally:
            self.cache, self.cached = decoder.rows.cache, [*prompt, *written][:-1]
            while written and written[-1] in (self.end, self.tokenizer.bos):
                written.pop()
            self.tokens = [*prompt, *written, self.end]

    def again(self) -> str | None:
        """Takes the last message back and returns it; None where there is none."""
        if not self.turns:
            return None
        text, begin = self.turns.pop()
        self.tokens = self.tokens[:begin]
        return text

    def _read(self, prompt: list[int]) -> Decoder:
        """A decoder that has read the prompt; what the cache has of it is not read again."""
        pairs = zip(self.cached, prompt[:-1])
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.cached), len(prompt) - 1))
        # A cache that keeps only a window has lost what came before it.
        start = same if self.rewinds or same == len(self.cached) else 0
        cache, before = self.cache, prompt[start - 1] if start else -1
        self.cached = []
        self.cache = decode.prefill(self.config, self.params, cache, prompt[start:-1], start, before)
        new = min(self.options.tokens, self.config.model.T - len(prompt))
        seed = (self.options.seed + self.answers) % 2**32
        self.answers += 1
        rows = decode.begin([self.cache], [prompt], 1, [new], seed)
        ends, calculator = (self.end, self.tokenizer.bos), Calculator(self.tokenizer, 1)
        return Decoder(self.config, self.params, rows, self.options.choice, ends, self.tokenizer.vocab_size, calculator)


class Printer:
    """Writes tokens as text: characters whole, calls of the calculator as [expression = result], no special token's name."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")
        self.special = {tokenizer.special(name): SHOWN.get(name, "") for name in SPECIAL_TOKENS}

    def text(self, tokens: list[int]) -> str:
        """What can be shown of the answer now. Bytes of an unfinished character wait for the next token."""
        out = []
        for token in tokens:
            if token in self.special:
                out.append(self.decoder.decode(b"", final=True) + self.special[token])
                self.decoder.reset()
            else:
                out.append(self.decoder.decode(self.tokenizer.decode_bytes([token])))
        return "".join(out)

    def rest(self) -> str:
        """An unfinished character at the answer's end, as U+FFFD."""
        return self.decoder.decode(b"", final=True)


def untrained(config: Config, params: Any, tokenizer: Tokenizer) -> bool:
    """Whether ending an answer is less likely than chance where one ends: a model that never saw a conversation."""
    ids, _ = conversation.render(
        tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    )
    if len(ids) > config.model.T:
        return False
    logits = jax.jit(model.forward, static_argnums=0)(config, params, jnp.asarray([ids[:-1]]))[0, -1]
    return bool(jax.nn.softmax(logits)[ids[-1]] < 1 / config.model.V)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event; a second one, before the first was obeyed, is a KeyboardInterrupt."""
    stop = threading.Event()

    def handle(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def say(chat: Chat, text: str) -> None:
    """Streams the answer to a message to stdout."""
    printer, terminal, tokens = Printer(chat.tokenizer), sys.stdout.isatty(), []
    show = lambda piece: sys.stdout.write(piece.translate(CONTROL) if terminal else piece)
    with interrupts() as stop, contextlib.closing(chat.answer(text, stop)) as answer:
        for new in answer:
            tokens += new
            show(printer.text(new))
            sys.stdout.flush()
        show(printer.rest() + "\n")
        sys.stdout.flush()
        if stop.is_set():
            note("stopped")
        elif len(tokens) and tokens[-1] not in (chat.end, chat.tokenizer.bos):
            note(f"cut after {len(tokens)} tokens")


def note(text: str) -> None:
    """A remark that is no part of an answer: on stderr, in brackets."""
    print(f"({text})", file=sys.stderr, flush=True)


def converse(chat: Chat) -> None:
    """Messages from stdin, a line each, until it ends. What goes wrong with one is told, and the conversation goes on."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and earlier ones fetched back
        note("/help lists the commands")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()  # the shell's prompt begins a line
            return
        except KeyboardInterrupt:
            note("/quit or Ctrl-D leaves")
            continue
        except UnicodeDecodeError:
            note("that line is not UTF-8")
            continue
        if line == "/quit":
            return
        try:
            obey(chat, line)
        except UserError as error:
            note(str(error))


def obey(chat: Chat, line: str) -> None:
    """One line of the user's: a command, or a message."""
    command, _, rest = line.partition(" ")
    if not line:
        return
    if not line.startswith("/"):
        return say(chat, line)
    if command == "/help":
        return note(HELP)
    if command == "/new":
        chat.new()
        return note("a new conversation")
    if command not in ("/again", "/edit"):
        raise UserError(f"{command}: no such command; /help lists them")
    if command == "/edit" and not rest.strip():
        raise UserError("/edit: write the new message behind it")
    last = chat.again()
    if last is None:
        raise UserError(f"{command}: there is no message yet")
    say(chat, last if command == "/again" else rest.strip())


def main() -> None:
    """The command."""
    parser = Parser(
        prog="python -m nanojax.chat",
        description="Talks with a trained run. Without a terminal it answers each line of stdin.\n\n" + HELP,
        examples="  python -m nanojax.chat --run=runs/d24-chat\n"
        "  python -m nanojax.chat --run=runs/d24-chat -p 'What is 12*34?' --temperature=0\n"
        "  python -m nanojax.chat --run=runs/d24-chat < questions.txt > answers.txt\n",
    )
    parser.add_argument("--run", type=cli.path, required=True, help="run folder")
    parser.add_argument("-p", "--prompt", help="one message; its answer is all that is written")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer at most (256)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 = always the likeliest token (0.6)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest tokens; 0 = all (50)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the fewest of this probability; 1 = all (1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed and messages give the same answers (0)")
    parser.add_argument("--step", type=int, help="a checkpoint's step; default: the newest")
    parser.add_argument(
        "--dtype", choices=[*checkpoint.DTYPES, "stored"], help="default: f32 on a CPU, else as trained"
    )
    parser.add_argument("--cache", choices=["float", "int8"], default="float", help="keys and values (float)")
    a = parser.parse_args()
    options = options_of(a.tokens, a.temperature, a.top_k, a.top_p, a.seed, a.cache == "int8")
    if a.prompt is not None and not a.prompt.strip():
        raise UserError("--prompt: is empty; write a message")
    xla.configure()
    dtype = a.dtype or ("f32" if jax.default_backend() == "cpu" else "stored")
    config, params, tokenizer = checkpoint.load_params(a.run, None if dtype == "stored" else dtype, a.step)
    if untrained(config, params, tokenizer):
        note(BASE)
    chat = Chat(config, params, tokenizer, options)
    if a.prompt is None:
        converse(chat)
    else:
        say(chat, a.prompt)


def options_of(tokens: int, temperature: float, top_k: int, top_p: float, seed: int, int8_cache: bool) -> Options:
    """UserError names the first that is out of range."""
    good = {
        "tokens": tokens >= 1,
        "temperature": 0 <= temperature < 1e6,
        "top-k": 0 <= top_k < 2**31,
        "top-p": 0 < top_p <= 1,
        "seed": 0 <= seed < 2**32,
    }
    for name, value in zip(good, (tokens, temperature, top_k, top_p, seed)):
        if not good[name]:
            raise UserError(f"--{name}={value}: out of range; see --help")
    return Options(Choice(temperature, top_k, top_p), tokens, seed, int8_cache)


if __name__ == "__main__":
    run_main(main)
