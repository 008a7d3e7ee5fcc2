"""Packing of conversations: each once per repeat, whole or cut by the rule, a supervised token in every row, the same always."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojax.tasks.packing import plan_pass
from nanojax.tasks.prepared import Conversations
from nanojax.tasks.stream import read_row

BOS = 9


def made(
    lengths: list[int], first: list[int], counts: tuple[int, ...] = (), repeats: tuple[int, ...] = ()
) -> Conversations:
    """Conversation i: `lengths[i]` tokens i+10, supervised from `first[i]` on."""
    tokens = np.concatenate([np.full(n, i + 10) for i, n in enumerate(lengths)]).astype(np.uint16)
    mask = np.concatenate([np.arange(n) >= k for n, k in zip(lengths, first)]).astype(np.uint8)
    return Conversations(tokens, mask, np.cumsum(lengths), counts or (len(lengths),), repeats or (1,), "x")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(1, 40)), min_size=1, max_size=60), st.integers(8, 30),
    st.integers(0, 5), st.integers(1, 3),
)  # fmt: skip
def test_every_conversation_once_for_each_repeat(sizes, row: int, seed: int, times: int) -> None:
    """Over lengths, rows and repeats: none is lost, doubled or cut but by the rule; no row is without supervision."""
    lengths, first = [n for n, _ in sizes], [k for _, k in sizes]
    of = made(lengths, first, repeats=(times,))
    plan = plan_pass(of, row, seed)
    usable = [i for i, (n, k) in enumerate(sizes) if k < min(n, row)]
    assert Counter(plan.numbers.tolist()) == dict.fromkeys(usable, times)
    assert plan.left_out == times * (len(sizes) - len(usable)) and plan.cut == times * sum(
        lengths[i] > row for i in usable
    )
    for r in range(plan.rows):
        members = plan.numbers[plan.first[r] : plan.first[r + 1]]
        tokens, mask = read_row(of, plan, r, BOS, row)
        whole = [np.full(min(lengths[i], row), i + 10) for i in members]
        used = sum(map(len, whole))
        assert np.array_equal(tokens, np.concatenate([*whole, np.full(row - used, BOS)]))
        wanted = [np.arange(min(lengths[i], row)) >= first[i] for i in members]
        assert np.array_equal(mask, np.concatenate([*wanted, np.zeros(row - used)]))
        assert mask[1:].sum() > 0 and used <= row


def test_the_longest_that_fits_is_taken() -> None:
    """Best fit fills rows of 10 from 6, 6, 4, 4, 3, 7 without padding."""
    plan = plan_pass(made([6, 6, 4, 4, 3, 7], [1] * 6), 10, 0)
    assert plan.rows == 3


def test_repeats_and_order() -> None:
    """The second task comes three times in a pass; another seed gives another order, the same seed the same one."""
    of = made([3] * 40, [1] * 40, (30, 10), (1, 3))
    a, b, c = (plan_pass(of, 4, seed) for seed in (1, 1, 2))
    assert Counter(a.numbers.tolist()) == {**dict.fromkeys(range(30), 1), **dict.fromkeys(range(30, 40), 3)}
    assert np.array_equal(a.numbers, b.numbers) and not np.array_equal(a.numbers, c.numbers)


def test_rows_are_in_no_order_of_length() -> None:
    """Best fit takes long conversations first; after the shuffle the first and the second half of a pass are alike."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 60, 800)
    plan = plan_pass(made(lengths.tolist(), [1] * 800), 60, 0)
    members = np.diff(plan.first)
    half = plan.rows // 2
    assert members[:half].mean() == pytest.approx(members[half:].mean(), rel=0.15)
