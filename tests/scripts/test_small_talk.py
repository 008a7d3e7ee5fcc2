"""scripts/small_talk.py: conversations of a small corpus as lines that nanojax.tasks reads; mistakes in one line."""

import json
from pathlib import Path

import pytest
import small_talk

from nanojax.cli import UserError
from nanojax.tasks import mixture

CORPUS = """\
categories:
- talk
conversations:
- - Hello
  - 'Hi: there'
  - What year is it?
  - 1963
  - Thank you
- - Nobody answers
- - ¿Qué tal?
  - Bien
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the corpus' layout with one topic."""
    package = tmp_path / "site" / small_talk.PACKAGE
    (package / "data" / "english").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "data" / "english" / "talk.yml").write_text(CORPUS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return package / "data" / "english"


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["small_talk.py", *arguments])
    small_talk.main()


def test_lines_are_conversations(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns alternate from the user on; a last message without an answer is left out; bare numbers are text."""
    out = tmp_path / "new" / "talk.jsonl"
    _run(monkeypatch, "talk", "--out", str(out))
    found = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [[message["content"] for message in messages] for messages in found] == [
        ["Hello", "Hi: there", "What year is it?", "1963"], ["¿Qué tal?", "Bien"],
    ]  # fmt: skip
    assert [message["role"] for message in found[0]] == ["user", "assistant"] * 2
    read = list(mixture.conversations(mixture.parse(str(out)), Path(), lambda: []))
    assert [each.messages for each in read] == found


@pytest.mark.parametrize(
    "broken", ["a: [", "conversations: 3", "[]", "conversations:\n- 3", "", "conversations:\n- Hello"]
)
def test_a_file_that_is_no_corpus_is_named(
    broken: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written."""
    (corpus / "talk.yml").write_text(broken)
    with pytest.raises(UserError, match=r"talk.yml: not a file of chatterbot-corpus"):
        _run(monkeypatch, "talk", "--out", str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_mistakes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such topic or language, no package: what there is, or what to do."""
    for arguments, says in ((["talks"], "there are talk"), (["talk", "--language=klingon"], "there are english")):
        with pytest.raises(UserError, match=says):
            _run(monkeypatch, *arguments, "--out", str(tmp_path / "out"))
    monkeypatch.setattr(small_talk, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install"):
        _run(monkeypatch, "talk", "--out", str(tmp_path / "out"))
