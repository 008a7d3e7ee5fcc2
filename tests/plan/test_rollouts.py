"""Reinforcement learning compiled for an absent card: both peaks within 12 GB, and its hours beside the bandwidth's limit."""

import pytest

from nanojax import config_files, hardware, xla
from nanojax.cli import UserError
from nanojax.hardware import GIB
from nanojax.plan import compile, decoding, rollouts

NO_COMPILER = pytest.mark.skipif(not xla.cuda_compiler_installed(), reason="the plan extra is not installed")
CARD = hardware.CARDS["rtx4070"]


@pytest.mark.plan
@pytest.mark.slow  # four compilations of a minute or two
@NO_COMPILER
@pytest.mark.parametrize("name", ["d24_2026_4070", "d32_4070"])
def test_peaks_and_hours(name: str) -> None:
    """16 answers of 512 tokens fit in 10.5 GiB while they are written and while they are trained.

    While they are written the step's accumulators are not there: what is beside parameters, optimizer and cache is small.
    Writing takes at most twice what the card's bandwidth allows.
    """
    plan = rollouts.make(config_files.load(name), CARD, 16, 512, cache=True, say=lambda _: None)
    config = plan.training.config
    assert config.batch_shape[1:] == (4, 513) and config.train.tokens_per_step == 16 * 16 * 512
    assert plan.fits and plan.answering_bytes <= 10.5 * GIB and plan.training_bytes <= 10.5 * GIB
    opt = plan.training.memory.opt
    held = plan.training.memory.params + opt + 17 / 16 * plan.decoder.rows * decoding._cache_bytes(config, 512, False)
    assert plan.answering_bytes < 1.1 * held
    # XLA's donation is complete: the new state is the old one's memory
    assert plan.training.memory.not_reused == 0
    assert compile.state_bytes(config) < plan.answering_bytes < plan.training_bytes
    assert plan.limit_hours < plan.decode_hours < 2 * plan.limit_hours
    assert plan.as_json()["answers"] * 256 == 30_605_312


def test_sizes_that_cannot_be() -> None:
    """Rows longer than the model's sequence are refused before anything compiles; microbatches divide the answers."""
    config = config_files.load("d24_2026_4070")
    with pytest.raises(UserError, match="longer than the model's sequence"):
        rollouts.of_config(config, 16, 4096)
    for row, microbatch in ((2048, 1), (512, 4), (600, 2), (64, 32)):
        made = rollouts.of_config(config, 16, row)
        assert made.train.microbatch == microbatch and made.microbatches * microbatch == 256
