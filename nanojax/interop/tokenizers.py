"""Tokenizers of other programs, both ways: nanochat's tokenizer.pkl, transformers' tokenizer.json.

All three are the same byte-level BPE; the files differ. tokenizer.json writes bytes as printable characters (GPT-2's
table) and lists the merges, which our rank-ordered tokens imply.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanojax import files
from nanojax.cli import UserError, first_line
from nanojax.interop import chat_template, torch_file
from nanojax.tokenizer import SPECIAL_TOKENS, Tokenizer


def _byte_characters() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the other 68 for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# Not bos: generate() masks what equals the padding token, and every prompt begins with bos.
PADDING = "<|output_end|>"
CHARACTER = _byte_characters()
BYTE = {character: byte for byte, character in CHARACTER.items()}


def load(places: list[Path]) -> Tokenizer:
    """The first tokenizer found in `places` (folders or files): ours, transformers' or nanochat's."""
    for place in places:
        candidates = [place / "tokenizer.json", place / "tokenizer.pkl"] if place.is_dir() else [place]
        for path in candidates:
            if path.is_file():
                return _load_pickle(path) if path.suffix == ".pkl" else _load_json(path)
    looked = ", ".join(str(p) for p in places)
    raise UserError(f"no tokenizer.json or tokenizer.pkl in {looked}; name it with --tokenizer=PATH")


def _build(path: Path, ranks: Mapping[bytes, int], special: Mapping[str, int], pattern: str) -> Tokenizer:
    n = len(ranks)
    if not all(type(rank) is int for rank in ranks.values()):
        raise UserError(f"{path}: ids of ordinary tokens are not whole numbers; such a tokenizer cannot be taken over")
    if sorted(ranks.values()) != list(range(n)):
        raise UserError(f"{path}: ids of ordinary tokens are not 0..{n - 1}; such a tokenizer cannot be taken over")
    if dict(special) != {name: n + i for i, name in enumerate(SPECIAL_TOKENS)}:
        raise UserError(f"{path}: special tokens are not nanochat's nine in the last ids; it has {list(special)[:9]}")
    try:
        built = Tokenizer(sorted(ranks, key=ranks.__getitem__), pattern)
        built.encode("a text 1")
        return built
    except BaseException as error:  # tiktoken panics on some patterns, which is no Exception
        if isinstance(error, (UserError, KeyboardInterrupt)):
            raise
        raise UserError(f"{path}: its split pattern is none ({first_line(error)})") from None


def _load_pickle(path: Path) -> Tokenizer:
    state = torch_file.read_tokenizer_pickle(path)
    return _build(path, state["mergeable_ranks"], state["special_tokens"], state["pat_str"])


def _load_json(path: Path) -> Tokenizer:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "tokens_base64" in content:
            return Tokenizer.load(path.parent)
        model = content["model"]
        special = {t["content"]: t["id"] for t in sorted(content["added_tokens"], key=lambda t: t["id"])}
        vocab = {t: i for t, i in model["vocab"].items() if t not in special}
        ranks = {bytes(BYTE[c] for c in token): i for token, i in vocab.items()}
        parts = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
        patterns = [p["pattern"]["Regex"] for p in parts if p["type"] == "Split"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        made = [ranks[bytes(BYTE[c] for c in "".join(pair))] for pair in merges]
        in_order = made == sorted(made) and len(set(made)) == len(ranks) - 256
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
    if model.get("type") != "BPE" or len(patterns) != 1 or content.get("normalizer"):
        raise UserError(f"{path}: not a byte-level BPE with one split pattern and no normalizer")
    if not in_order:
        raise UserError(f"{path}: its merges are not in the order of its ids; such a tokenizer cannot be taken over")
    return _build(path, ranks, special, patterns[0])


def merges(tokens: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token of more than one byte, in rank order: the two parts that all earlier merges leave.

    UserError for a token that no pair of earlier tokens makes.
    """
    rank = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token in tokens:
        if len(token) == 1:
            continue
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            joined = [rank.get(a + b, len(rank)) for a, b in itertools.pairwise(parts)]
            best = min(joined)
            if best >= rank[token]:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) != 2:
            raise UserError(f"tokenizer: token {token!r} is not made by one merge of earlier tokens")
        pairs.append((parts[0], parts[1]))
    return pairs


def save_nanochat(tokenizer: Tokenizer, out: Path, vocab: int) -> None:
    """tokenizer.pkl and token_bytes.pt as nanochat reads them. UserError unless the tokenizer has `vocab` ids."""
    if tokenizer.vocab_size != vocab:
        raise UserError(
            f"nanochat needs as many ids in the model as in the tokenizer; the model has {vocab}, the tokenizer "
            f"{tokenizer.vocab_size}; export to Hugging Face instead"
        )
    special = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
    torch_file.write_tokenizer_pickle(out / "tokenizer.pkl", tokenizer.tokens, tokenizer.pattern, special)
    torch_file.write_one(out / "token_bytes.pt", tokenizer.bytes_per_token().astype(np.int32))


def save_transformers(tokenizer: Tokenizer, out: Path, seq: int) -> None:
    """tokenizer.json and tokenizer_config.json, which put the begin token before a text, as training does; a chat template."""
    text = lambda token: "".join(CHARACTER[b] for b in token)
    special = {name: tokenizer.special(name) for name in SPECIAL_TOKENS}
    bos = SPECIAL_TOKENS[0]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    begin: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, a],
            "pair": [begin, a, b],
            "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text(t): i for i, t in enumerate(tokenizer.tokens)} | special,
            "merges": [[text(x), text(y)] for x, y in merges(tokenizer.tokens)],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": bos,
        "pad_token": PADDING,
        "model_max_length": seq,
        "clean_up_tokenization_spaces": False,
    }
    with files.write_atomic(out / "tokenizer.json") as file:
        file.write(json.dumps(content, ensure_ascii=False).encode())
    files.write_json(out / "tokenizer_config.json", settings)
    with files.write_atomic(out / chat_template.FILE) as file:
        file.write(chat_template.TEMPLATE.encode())
