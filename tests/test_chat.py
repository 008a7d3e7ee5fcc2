"""The chat: its cache changes nothing, its commands, its streams, what it shows, its mistakes."""

import io
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojax import chat, conversation, model, step
from nanojax.cli import UserError, run_main
from nanojax.config import Config
from nanojax.engine.choose import Choice
from nanojax.run import checkpoint, run_folder
from nanojax.tokenizer import Tokenizer

Make = Callable[..., Config]
TOKENIZER = Tokenizer([*(bytes([b]) for b in range(256)), "é".encode(), "日".encode()[:2], b" the"])
FAMILIES = {
    "gpt": dict(vocab=280, seq=128),
    "2026": dict(family="2026", depth=4, width=64, window=20, seq=128, vocab=280, qk_scale=1.2),
}


def made(tiny: Make, family: str = "gpt") -> tuple[Config, Any]:
    """A model with random parameters."""
    config = tiny(model=FAMILIES[family], train=dict(tokens_per_step=256, microbatch=2))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return config, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.3, a.dtype), shapes)


def answered(talk: chat.Chat, text: str) -> list[int]:
    """The whole answer."""
    return [token for new in talk.answer(text, threading.Event()) for token in new]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_no_answer(tiny: Make, family: str) -> None:
    """Three turns, one of them taken back and changed: each answer equals that of a chat that reads all of it anew."""
    config, params = made(tiny, family)
    options = chat.Options(Choice(0.0), tokens=12)
    talk = chat.Chat(config, params, TOKENIZER, options)
    answered(talk, "ab")
    answered(talk, "c")
    assert talk.again() == "c"
    for text in ("déf", "g"):
        before = list(talk.tokens)
        got = answered(talk, text)
        fresh = chat.Chat(config, params, TOKENIZER, options)
        fresh.tokens = before
        assert answered(fresh, text) == got
    whole = np.asarray(model.forward(config, params, jnp.asarray([talk.tokens])))[0].argmax(-1)
    begin = len(talk.tokens) - len(got) - (got[-1] not in (talk.end, TOKENIZER.bos))
    assert whole[begin - 1 : begin - 1 + len(got)].tolist() == got


@pytest.mark.long
def test_a_first_message_without_room(tiny: Make) -> None:
    """Where nothing was said yet, another conversation would not help."""
    talk = chat.Chat(*made(tiny), TOKENIZER, chat.Options(Choice(0.0), tokens=5))
    with pytest.raises(UserError, match=r"shorten it$"):
        answered(talk, "long " * 100)


@pytest.mark.long
def test_turns_are_rendered_as_in_training(tiny: Make) -> None:
    """The tokens of a conversation are those of conversation.render, an answer's as it was written; cut ones are closed."""
    config, params = made(tiny)
    talk = chat.Chat(config, params, TOKENIZER, chat.Options(Choice(0.0), tokens=5))
    first = answered(talk, "Hi <|user_end|>")
    prompt = conversation.render_for_completion(TOKENIZER, [{"role": "user", "content": "Hi <|user_end|>"}])
    assert talk.tokens == [*prompt, *first, talk.end]
    answered(talk, "x")
    question = conversation.render_for_completion(TOKENIZER, [{"role": "user", "content": "x"}])[1:]
    assert talk.tokens[len(prompt) + 6 :][: len(question)] == question
    with pytest.raises(UserError, match=r"leave no room .* /new begins another conversation"):
        answered(talk, "long " * 100)
    assert len(talk.turns) == 2


@pytest.mark.long
def test_again_draws_anew_and_seeds_repeat(tiny: Make) -> None:
    """The second answer to a message differs from the first; a chat with the same seed gives both again."""
    config, params = made(tiny)
    runs = []
    for _ in range(2):
        talk = chat.Chat(config, params, TOKENIZER, chat.Options(Choice(1.5), tokens=12, seed=5))
        first = answered(talk, "a")
        runs.append((first, answered(talk, talk.again() or "")))
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_characters_and_calls_are_shown_whole() -> None:
    """Bytes of a character over three tokens, a call with its result, an unfinished end; no special token's name."""
    printer = chat.Printer(TOKENIZER)
    special = TOKENIZER.special
    assert [printer.text([t]) for t in (257, "日".encode()[2])] == ["", "日"]
    call = [special("<|python_start|>"), *b"6*7", special("<|python_end|>")]
    call += [special("<|output_start|>"), *b"42", special("<|output_end|>"), special("<|assistant_end|>")]
    assert printer.text(call) == "[6*7 = 42]"
    assert printer.text([0xF0, 0x9F]) == "" and printer.rest() == "�"


@pytest.mark.long
def test_ctrl_c_stops_the_answer_and_not_the_chat(
    tiny: Make, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while tokens come ends the answer; the conversation is whole and the next message is answered."""
    config, params = made(tiny)
    talk = chat.Chat(config, params, TOKENIZER, chat.Options(Choice(1.0), tokens=100))
    real = chat.Printer.text

    def interrupting(self: chat.Printer, tokens: list[int]) -> str:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(chat.Printer, "text", real)
        return real(self, tokens)

    monkeypatch.setattr(chat.Printer, "text", interrupting)
    chat.say(talk, "a")
    assert "(stopped)" in capsys.readouterr().err and talk.tokens[-1] == talk.end
    assert len(talk.tokens) < 20
    chat.say(talk, "b")
    assert "(stopped)" not in capsys.readouterr().err and len(talk.turns) == 2


@pytest.fixture
def run(tiny: Make, tmp_path: Path) -> Path:
    """A run folder with one checkpoint of random parameters."""
    config, params = made(tiny)
    TOKENIZER.save(tmp_path / "run" / "tokenizer")
    run_folder.write_config(tmp_path / "run", config)
    state = jax.jit(step.init_state, static_argnums=0)(config)._replace(params=params)
    writer = checkpoint.open_for_saving(tmp_path / "run", config)
    checkpoint.save(writer, config, state, {}, TOKENIZER.fingerprint)
    writer.close()
    return tmp_path / "run"


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str, stdin: str = "") -> None:
    monkeypatch.setattr("sys.argv", ["chat", *arguments])
    monkeypatch.setattr("nanojax.xla.configure", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    run_main(chat.main)


@pytest.mark.long
def test_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """-p gives one answer; a pipe gives one for each line, with commands between; mistakes in it are told and passed over."""
    options = (f"--run={run}", "--temperature=0", "--tokens=6")
    _command(monkeypatch, *options, "-p", "é")
    one = capsys.readouterr()
    assert "(cut after 6 tokens)" in one.err or one.out.endswith("\n")
    lines = "é\n\n/help\n/nonsense\n/edit\n/new\n/again\né\n/quit\nnever\n"
    _command(monkeypatch, *options, stdin=lines)
    both = capsys.readouterr()
    assert both.out == one.out * 2
    for said in ("/edit TEXT", "/nonsense: no such command", "write the new message", "there is no message yet"):
        assert said in both.err


@pytest.mark.parametrize(
    "wrong",
    [[], ["--run=/nowhere"], ["--tokens=0"], ["--temperature=nan"], ["--top-k=-1"], ["--top-p=0"], ["--top-p=1.1"],
     ["--seed=-1"], ["--dtype=int3"], ["--cache=int4"], ["-p", " "], ["--nonsense=1"]],
)  # fmt: skip
def test_command_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, wrong: list[str]) -> None:
    """Each mistake: one line, exit 2."""
    with pytest.raises(SystemExit) as stop:
        _command(monkeypatch, *(wrong if not wrong or wrong[0] == "--run=/nowhere" else ["--run=/nowhere", *wrong]))
    said = capsys.readouterr()
    assert stop.value.code == 2 and len(said.err.splitlines()) == 1 and said.err.startswith("error: ")
    assert said.out == ""
