"""The tokenizer: round trips on any text and bytes, nanochat's layout of ids, a plain file that refuses damage."""

import json
import os

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanojax import tokenizer as tokenizers
from nanojax.cli import UserError
from nanojax.tokenizer import MAX_SPACES, SPECIAL_TOKENS, Tokenizer

TEXT = (
    "The people's House, in 1790 and 2026: “liberty” — naïve café, 東京 🙂!\n\n\tfor i in range(10):\n        x += i\n"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """512 ids trained on a few lines of mixed text."""
    return tokenizers.train(iter([TEXT * 5, "the and of to in that it is was for " * 50, TEXT[::-1] * 3]), 360)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
@example(text="<|bos|>")
@example(text="\x00\r\n \u2028\u3000")
@settings(max_examples=300, deadline=None)
def test_any_unicode_round_trips(tokenizer: Tokenizer, text: str) -> None:
    """decode(encode(text)) is the text for any Unicode text, and no ordinary text gives a special token."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < len(tokenizer.tokens) for i in ids)
    assert tokenizer.encode_numpy(text).tolist() == ids


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_round_trip(tokenizer: Tokenizer, data: bytes) -> None:
    """Every byte string can be written in ids (the 256 single bytes are tokens) and read back exactly."""
    rank = {token: i for i, token in enumerate(tokenizer.tokens)}
    ids = [rank[bytes([byte])] for byte in data]
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", errors="replace")


@given(text=st.text(max_size=100))
@settings(max_examples=200, deadline=None)
def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer, text: str) -> None:
    """Text with half a surrogate pair, which UTF-8 cannot hold, encodes alike by all three ways, without an error."""
    ids = tokenizer.encode(text)
    assert tokenizer.encode_numpy(text).tolist() == ids == tokenizer.encode_batch([text], threads=1)[0]
    assert tokenizer.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("char", [" ", "\n", "\u3000", "a", "1"])
def test_a_million_equal_characters_encode(tokenizer: Tokenizer, char: str) -> None:
    """Runs that overflow the stack of tiktoken's own regex (a million spaces do) still round-trip."""
    text = "x" + char * 1_000_000 + "y"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert len(tokenizer.encode_numpy(text)) == len(tokenizer.encode(text))


def test_long_text_is_not_cut_elsewhere(tokenizer: Tokenizer) -> None:
    """Above MAX_SPACES characters of ordinary text, ids equal those of tiktoken on the whole text."""
    text = TEXT * (2 * MAX_SPACES // len(TEXT))
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_layout_is_nanochats(tokenizer: Tokenizer) -> None:
    """The nine special tokens have the last ids in nanochat's order; the vocabulary has exactly the size asked for."""
    assert tokenizer.vocab_size == 360 == len(tokenizer.tokens) + 9
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(351, 360))
    assert tokenizer.bos == tokenizer.special("<|bos|>") == 351
    assert tokenizer.decode([tokenizer.bos]) == "<|bos|>"
    with pytest.raises(UserError, match="no special token"):
        tokenizer.special("<|nothing|>")
    with pytest.raises(UserError, match="outside the vocabulary"):
        tokenizer.decode([360])


def test_numbers_split_in_pairs(tokenizer: Tokenizer) -> None:
    """nanochat's pattern: no token spans more than two digits, nor a letter and a digit."""
    tokenizer = tokenizers.train(iter(["1234567890 " * 2000 + "abc1def2 " * 2000]), 275)
    assert all(sum(chr(b).isdigit() for b in token) <= 2 for token in tokenizer.tokens)
    assert not [t for t in tokenizer.tokens if t.isalnum() and not t.isdigit() and not t.isalpha()]


def test_bytes_per_token(tokenizer: Tokenizer) -> None:
    """Summed over an encoded text the table gives the text's UTF-8 bytes; special tokens count nothing."""
    table = tokenizer.bytes_per_token()
    assert table.dtype == np.int32 and table.shape == (360,)
    assert table[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert (table[-9:] == 0).all() and (table[:-9] > 0).all()


def test_training_is_deterministic_and_agrees_with_rustbpe(tokenizer: Tokenizer) -> None:
    """Two trainings give the same fingerprint, and tiktoken's ids equal rustbpe's own encoding."""
    import rustbpe

    again = tokenizers.train(iter([TEXT * 5, "the and of to in that it is was for " * 50, TEXT[::-1] * 3]), 360)
    assert again.fingerprint == tokenizer.fingerprint
    bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.train_from_iterator(iter([TEXT * 5]), 320, pattern=tokenizers.SPLIT_PATTERN)
    ours = tokenizers.train(iter([TEXT * 5]), 329)
    assert ours.encode(TEXT) == bpe.encode(TEXT)


@pytest.mark.parametrize("size", [0, 264, 65_537])
def test_impossible_sizes_are_refused(size: int) -> None:
    """A vocabulary below bytes + special tokens or beyond uint16 is one UserError."""
    with pytest.raises(UserError, match="must be 265 to 65536"):
        tokenizers.train(iter(["text"]), size)


def test_too_little_text_is_an_error() -> None:
    """A text with too few pairs for the size says how many ids it yields; no smaller vocabulary in silence."""
    with pytest.raises(UserError, match="only yields"):
        tokenizers.train(iter(["tiny"]), 4096)


def test_file_is_plain_json_and_loads_offline(tokenizer: Tokenizer, tmp_path) -> None:
    """Saved and loaded, the tokenizer has the same fingerprint and ids; the file is JSON, with no temporary left."""
    path = tokenizer.save(tmp_path)
    assert json.loads(path.read_text())["fingerprint"] == tokenizer.fingerprint
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_fingerprint_depends_on_everything_that_decides_ids(tokenizer: Tokenizer) -> None:
    """Another order of tokens or another pattern is another fingerprint."""
    swapped = [*tokenizer.tokens[:-2], tokenizer.tokens[-1], tokenizer.tokens[-2]]
    assert Tokenizer(swapped).fingerprint != tokenizer.fingerprint
    assert Tokenizer(tokenizer.tokens, r"\s+|\S+").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("damage", ["missing", "cut", "token", "fingerprint", "pattern", "not json", "list", "binary"])
def test_damaged_file_is_refused_by_name(tokenizer: Tokenizer, tmp_path, damage: str) -> None:
    """Any damage to tokenizer.json is one UserError that names the file."""
    path = tokenizer.save(tmp_path)
    content = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_text(path.read_text()[:-200])
    elif damage == "token":
        content["tokens_base64"][300] = "QUJD"
    elif damage == "fingerprint":
        content["fingerprint"] = "0" * 64
    elif damage == "pattern":
        content["pattern"] = "("
    if damage in ("token", "fingerprint", "pattern"):
        path.write_text(json.dumps(content))
    elif damage in ("not json", "list", "binary"):
        path.write_bytes({"not json": b"hello", "list": b"[1]", "binary": b"\xff\xfe\x00"}[damage])
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_special_names_in_text_are_ordinary_text(tokenizer: Tokenizer) -> None:
    """A document that spells <|bos|> cannot forge a document border."""
    assert tokenizer.bos not in tokenizer.encode("evil <|bos|> text")
    assert isinstance(tokenizer._encoding, tiktoken.Encoding)


def test_nanochats_older_count_of_bytes() -> None:
    """Rule "decoded": a part of a character counts the 3 bytes of U+FFFD, whole characters what they have, specials 0."""
    tokens = [*(bytes([b]) for b in range(256)), "é".encode(), "日".encode()[:2], b" the"]
    tokenizer = Tokenizer(tokens)
    raw, decoded = tokenizer.bytes_per_token(), tokenizer.bytes_per_token("decoded")
    assert list(raw[[65, 200, 256, 257, 258]]) == [1, 1, 2, 2, 4] and list(decoded[[65, 200, 256, 257, 258]]) == [
        1,
        3,
        2,
        3,
        4,
    ]
    assert not raw[-9:].any() and not decoded[-9:].any()
