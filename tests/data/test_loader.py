"""The loader: the same batches for a seed, after any resume, and while shards appear; fast, and restored in O(1)."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from nanojax import tokenizer as tokenizers
from nanojax.cli import UserError
from nanojax.data import loader
from nanojax.data.loader import TrainIterator, train_iterator, valid_batches
from nanojax.data.shards import Writer, find_shards
from nanojax.tokenizer import Tokenizer

D32_ON_A_4070 = 9_700  # tokens per second; the loader must do 200 times that


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """300 ids."""
    return tokenizers.train(iter(["the state of the union and the people of the land " * 20]), 290)


def add_shard(folder: Path, tokenizer: Tokenizer, number: int, documents: int, split: str = "train") -> None:
    """Writes a shard of random documents of 5 to 150 tokens that depends on its number alone."""
    rng = np.random.default_rng(number + 1000 * (split == "valid"))
    writer = Writer(folder, f"{split}_{number:05d}")
    for _ in range(documents):
        body = rng.integers(0, len(tokenizer.tokens), rng.integers(5, 150))
        writer.append(np.concatenate([[tokenizer.bos], body]).astype(np.uint16), 1)
    writer.commit({"tokenizer": tokenizer.fingerprint})


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Three train shards and one of validation."""
    tokenizer.save(tmp_path / "tokenizer")
    for number in range(3):
        add_shard(tmp_path, tokenizer, number, 200)
    add_shard(tmp_path, tokenizer, 0, 60, "valid")
    return tmp_path


def remove(folder: Path, shards: str) -> None:
    """Deletes the tokens and the metadata of the shards that match: "train_00001*"."""
    for path in folder.glob(shards):
        path.unlink()


def take(iterator, count: int) -> np.ndarray:
    """The next batches, stacked."""
    return np.stack([next(iterator) for _ in range(count)])


def state_of(iterator) -> dict:
    """The state as a checkpoint stores it."""
    return json.loads(json.dumps(iterator.get_state()))


def rows_set(batches: np.ndarray) -> list[bytes]:
    """All rows as bytes, sorted."""
    return sorted(row.tobytes() for row in batches.reshape(-1, batches.shape[-1]))


def test_shape_and_begin_token(folder: Path, tokenizer: Tokenizer) -> None:
    """Batches are int32 [rows, T+1], every row starts with the begin token, all ids are in the vocabulary."""
    batch = take(train_iterator(folder, 4, 64, 0, 512), 20)
    assert batch.shape == (20, 4, 65) and batch.dtype == np.int32
    assert (batch[..., 0] == tokenizer.bos).all()
    assert batch.min() >= 0 and batch.max() < tokenizer.vocab_size


def test_seed_decides_the_order(folder: Path) -> None:
    """The same seed gives the same batches, another seed others, and both the same set of rows in a pass."""
    total = train_iterator(folder, 1, 64, 0, 512).stream.passes[0].rows
    first, same, other = (take(train_iterator(folder, 1, 64, seed, 512), total) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any(axis=(1, 2)).mean() > 0.9
    assert rows_set(first) == rows_set(other)


def test_each_row_once_a_pass_in_another_order_each_time(folder: Path) -> None:
    """Two passes over unchanged shards have the same rows, each exactly once, in different orders."""
    iterator = train_iterator(folder, 1, 64, 7, 512)
    total = iterator.stream.passes[0].rows
    first, second = take(iterator, total), take(iterator, total)
    assert rows_set(first) == rows_set(second) and len(set(rows_set(first))) == total
    assert (first != second).any(axis=(1, 2)).mean() > 0.9
    ends = iterator.stream.passes[0].ends
    assert len(ends) == 3


@pytest.mark.parametrize("steps", [0, 1, 7, 33, 150, 400])
def test_resume_at_any_step(folder: Path, steps: int) -> None:
    """After any number of steps (several passes among them) a fresh iterator with the saved state gives the same
    batches as the one that went on."""
    iterator = train_iterator(folder, 8, 64, 3, 512)
    for _ in range(steps):
        next(iterator)
    state = state_of(iterator)
    expected = take(iterator, 120)
    resumed = train_iterator(folder, 8, 64, 3, 512)
    resumed.set_state(state)
    assert state_of(resumed) == state
    np.testing.assert_array_equal(take(resumed, 120), expected)
    assert state_of(resumed)["position"] == (steps + 120) * 8


def test_going_back_in_a_running_iterator(folder: Path) -> None:
    """set_state on an iterator whose prefetching is under way goes back exactly, again and again."""
    iterator = train_iterator(folder, 4, 64, 3, 512)
    total = iterator.stream.passes[0].rows // 4
    take(iterator, total - 2)  # prefetching is about to begin the next pass
    state = state_of(iterator)
    expected = take(iterator, 10)
    for _ in range(10):
        iterator.set_state(state)
        np.testing.assert_array_equal(take(iterator, 10), expected)


def test_resume_with_another_batch_size(folder: Path) -> None:
    """A run that is resumed with another number of rows per batch continues at the next row."""
    iterator = train_iterator(folder, 8, 64, 3, 512)
    take(iterator, 5)
    state = state_of(iterator)
    expected = take(iterator, 6).reshape(-1, 65)
    resumed = train_iterator(folder, 3, 64, 3, 512)
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 16).reshape(-1, 65), expected)


def test_new_shards_join_at_the_next_pass(folder: Path, tokenizer: Tokenizer) -> None:
    """Shards added during training change nothing in the pass under way; the next pass is over the new ones alone (the
    old were seen once already), the one after over all; a resume before and after the border gives the same batches."""
    iterator = train_iterator(folder, 1, 64, 0, 512)
    total = iterator.stream.passes[0].rows
    take(iterator, 10)
    before = state_of(iterator)
    add_shard(folder, tokenizer, 3, 100)
    add_shard(folder, tokenizer, 4, 100)
    rest = take(iterator, total - 10)
    fresh = train_iterator(folder, 1, 64, 0, 512)  # another machine that copied the folder later, at the same position
    fresh.set_state(before)
    np.testing.assert_array_equal(take(fresh, total - 10), rest)
    new = find_shards(folder, "train", tokenizer.fingerprint)[3:]
    second = take(iterator, 30)
    after = state_of(iterator)
    assert [list(entry["shards"]) for entry in after["passes"]] == [[shard.name for shard in new]]
    resumed = train_iterator(folder, 1, 64, 0, 512)
    resumed.set_state(after)
    np.testing.assert_array_equal(take(resumed, 300), take(iterator, 300))
    np.testing.assert_array_equal(take(fresh, 30), second)
    assert len(state_of(iterator)["passes"][0]["shards"]) == 5
    seen = rows_set(np.concatenate([rest, second]))
    assert len(seen) == len(set(seen))


def test_a_shard_too_small_for_a_row_is_passed_over(folder: Path, tokenizer: Tokenizer) -> None:
    """A new shard that fills no row neither stops training nor becomes an endless empty pass."""
    iterator = train_iterator(folder, 1, 64, 0, 512)
    writer = Writer(folder, "train_00003")
    writer.append(np.array([tokenizer.bos, 1, 2], np.uint16), 1)
    writer.commit({"tokenizer": tokenizer.fingerprint})
    total = iterator.stream.passes[0].rows
    assert rows_set(take(iterator, total)) == rows_set(take(iterator, total))


def test_a_copied_folder_gives_the_same_batches(folder: Path, tmp_path_factory) -> None:
    """Copied without its plans and with other modification times, the folder gives the same batches and resumes."""
    import shutil

    iterator = train_iterator(folder, 4, 64, 5, 512)
    take(iterator, 9)
    state = state_of(iterator)
    copy = tmp_path_factory.mktemp("elsewhere") / "data"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("packed_*"))
    resumed = train_iterator(copy, 4, 64, 5, 512)
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 40), take(iterator, 40))


def test_validation_is_fixed_and_complete(folder: Path, tokenizer: Tokenizer) -> None:
    """Validation gives every whole batch once, the same each time, in an order that is not that of length."""
    first, again = np.stack(list(valid_batches(folder, 4, 64))), np.stack(list(valid_batches(folder, 4, 64)))
    np.testing.assert_array_equal(first, again)
    rows = np.stack(list(valid_batches(folder, 1, 64))).reshape(-1, 65)
    assert len(first) == len(rows) // 4 and len(set(rows_set(rows))) == len(rows)
    assert (first[..., 0] == tokenizer.bos).all()


def test_early_validation_batches_stay_when_shards_are_added(folder: Path, tokenizer: Tokenizer) -> None:
    """A fixed evaluation budget reads the same rows after more validation shards have appeared."""
    before = np.stack(list(valid_batches(folder, 4, 64)))
    add_shard(folder, tokenizer, 1, 60, "valid")
    np.testing.assert_array_equal(np.stack(list(valid_batches(folder, 4, 64)))[: len(before)], before)


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no folder", "no data folder there"),
        ("no tokenizer", "no tokenizer there"),
        ("no shards", "no training shards"),
        ("missing", r"train_00001\.json: missing, though train_00002 is there"),
        ("bin missing", r"train_00001\.bin: this token shard is missing"),
        ("truncated", r"train_00001\.bin: 100 bytes where"),
        ("flipped", r"train_00001\.bin: content does not match"),
        ("json", r"train_00001\.json: damaged"),
        ("tokenizer", r"train_00000\.bin: made with another tokenizer"),
        ("vocab", "has 290 ids, the model only 256"),
        ("long", "do not fill one row of 100001 tokens"),
    ],
)
def test_bad_folders_are_one_line(folder: Path, tokenizer: Tokenizer, damage: str, message: str) -> None:
    """Whatever is wrong with a folder is a UserError naming the file, raised before the first batch."""
    seq, vocab = 64, 512
    if damage == "no folder":
        folder = folder / "absent"
    elif damage == "no tokenizer":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    elif damage == "no shards":
        remove(folder, "train_*")
    elif damage == "missing":
        remove(folder, "train_00001*")
    elif damage == "bin missing":
        (folder / "train_00001.bin").unlink()
    elif damage == "truncated":
        os.truncate(folder / "train_00001.bin", 100)
    elif damage == "flipped":
        raw = bytearray((folder / "train_00001.bin").read_bytes())
        raw[1001] ^= 4
        (folder / "train_00001.bin").write_bytes(raw)
    elif damage == "json":
        (folder / "train_00001.json").write_text("{}")
    elif damage == "tokenizer":
        tokenizers.train(iter(["another text entirely, with other words"]), 270).save(folder / "tokenizer")
    elif damage == "vocab":
        vocab = 256
    elif damage == "long":
        seq = 100_000
    with pytest.raises(UserError, match=message):
        train_iterator(folder, 4, seq, 0, vocab)


def test_too_little_validation_is_an_error(folder: Path) -> None:
    """Fewer validation rows than one batch is an error with both numbers, not an evaluation over nothing."""
    with pytest.raises(UserError, match=r"validation has \d+ rows of 65 tokens, fewer than one batch of 1000"):
        valid_batches(folder, 1000, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ("removed", r"train_00001\.bin: this run was reading it and it is gone|train_00001\.json: missing"),
        ("last removed", r"train_00002\.bin: this run was reading it and it is gone"),
        ("replaced", r"train_00001\.bin: not what this run was reading"),
        ("seed", "made with seed 3, this run has 4"),
        ("seq", "made with row 65, this run has 33"),
    ],
)
def test_resume_refuses_what_would_change_the_batches(
    folder: Path, tokenizer: Tokenizer, change: str, message: str
) -> None:
    """A shard removed or replaced since the checkpoint, another seed or sequence: one line, never other batches."""
    iterator = train_iterator(folder, 4, 64, 3, 512)
    take(iterator, 3)
    state = state_of(iterator)
    seed, seq = 3, 64
    if change == "removed":
        remove(folder, "train_00001*")
    elif change == "last removed":
        remove(folder, "train_00002*")
    elif change == "replaced":
        remove(folder, "train_00001*")
        writer = Writer(folder, "train_00001")
        writer.append(np.array([tokenizer.bos] + [5] * 500, np.uint16), 1)
        writer.commit({"tokenizer": tokenizer.fingerprint})
    seed += change == "seed"
    seq = 32 if change == "seq" else 64
    with pytest.raises(UserError, match=message):
        train_iterator(folder, 4, seq, seed, 512).set_state(state)


def test_a_shard_gone_at_a_pass_border_stops_the_run_by_name(folder: Path) -> None:
    """A shard that disappears while training is reported at the next pass, from grain's thread, as a UserError."""
    iterator = train_iterator(folder, 1, 64, 0, 512)
    remove(folder, "train_00002*")
    loader_total = iterator.stream.passes[0].rows
    with pytest.raises(UserError, match=r"train_00002\.bin"):
        take(iterator, 2 * loader_total)


@pytest.mark.long
def test_restore_at_step_one_million_is_fast(folder: Path, tokenizer: Tokenizer) -> None:
    """With 300 shards, set_state at step 1,000,000 and the next batch take under a second (folder of known plans)."""
    for number in range(3, 300):
        add_shard(folder, tokenizer, number, 10)
    iterator = train_iterator(folder, 8, 64, 0, 512)
    total = iterator.stream.passes[0].rows
    state = state_of(iterator)
    position = 1_000_000 * 8
    number = position // total
    state["position"] = position
    state["passes"][0] |= {"number": number, "start": number * total}
    state["visits"] = {name: number for name in state["visits"]}

    def restore() -> tuple[float, np.ndarray, int]:
        begin = time.perf_counter()
        resumed = train_iterator(folder, 8, 64, 0, 512)
        resumed.set_state(state)
        batch = next(resumed)
        return time.perf_counter() - begin, batch, state_of(resumed)["position"]

    seconds, batch, after = min((restore() for _ in range(3)), key=lambda r: r[0])  # the machine may be shared
    print(f"\nrestore at step 1,000,000 of 300 shards: {seconds:.3f} s")
    assert seconds < 1.0
    again = train_iterator(folder, 8, 64, 0, 512)
    again.set_state(state)
    np.testing.assert_array_equal(next(again), batch)
    assert after == position + 8


def test_state_made_by_hand_equals_walking_there(folder: Path) -> None:
    """The state three passes ahead, written by arithmetic, gives the batches that walking there gives: so the seek of
    the test above is the true one."""
    iterator = train_iterator(folder, 1, 64, 0, 512)
    total = iterator.stream.passes[0].rows
    state = state_of(iterator)
    state |= {"position": 3 * total + 5, "visits": {name: 3 for name in state["visits"]}}
    state["passes"][0] |= {"number": 3, "start": 3 * total}
    take(iterator, 3 * total + 5)
    resumed = train_iterator(folder, 1, 64, 0, 512)
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 50), take(iterator, 50))


def test_throughput_is_200_times_what_d32_consumes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Batches of 8 x 2,048 from shards of web-like documents come at 200 x 9,700 tokens per second or more."""
    rng = np.random.default_rng(0)
    tokenizer.save(tmp_path / "tokenizer")
    for number in range(2):
        writer = Writer(tmp_path, f"train_{number:05d}")
        for length in np.clip(rng.lognormal(6.0, 1.0, 4000), 2, 50_000).astype(int):
            writer.append(np.append([tokenizer.bos], rng.integers(0, 280, length)).astype(np.uint16), 1)
        writer.commit({"tokenizer": tokenizer.fingerprint})
    iterator = train_iterator(tmp_path, 8, 2048, 0, 512)
    next(iterator)
    best = 0.0
    for _ in range(3):  # the machine may be shared: the best of three short runs
        begin = time.perf_counter()
        tokens = sum(next(iterator).size for _ in range(100))
        best = max(best, tokens / (time.perf_counter() - begin))
    print(f"\nloader: {best / 1e6:.1f} M tokens/s, {best / D32_ON_A_4070:.0f} times d32 on a 4070")
    assert best > 200 * D32_ON_A_4070


def test_long_planning_shows_progress(folder: Path, monkeypatch, capsys) -> None:
    """The first opening of many tokens prints a progress line on stderr, the second (plans cached) does not."""
    monkeypatch.setattr(loader, "ANNOUNCE_TOKENS", 1000)
    train_iterator(folder, 4, 64, 0, 512)
    assert "packing rows of 65" in capsys.readouterr().err
    train_iterator(folder, 4, 64, 0, 512)
    assert not capsys.readouterr().err


def test_open_files_are_bounded(folder: Path, tokenizer: Tokenizer, monkeypatch) -> None:
    """With more shards than OPEN_SHARDS the loader keeps only OPEN_SHARDS open, and batches stay the same."""
    for number in range(3, 40):
        add_shard(folder, tokenizer, number, 10)
    expected = take(train_iterator(folder, 4, 64, 0, 512), 60)
    monkeypatch.setattr(loader, "OPEN_SHARDS", 3)
    before = len(os.listdir("/proc/self/fd"))
    iterator = train_iterator(folder, 4, 64, 0, 512)
    np.testing.assert_array_equal(take(iterator, 60), expected)
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 4
    assert iterator.stream.opened.cache_info().currsize <= 3
