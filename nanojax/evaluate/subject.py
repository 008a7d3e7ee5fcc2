"""The model that is evaluated: read from a run folder or from another program's checkpoint."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax

from nanojax import cli, interop
from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.evaluate import devices
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, its parameters on the devices that evaluate it.

    Results go to `out`, None = nowhere; `step` is its training step.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    name: str
    step: int
    out: Path | None

    def identity(self) -> dict[str, Any]:
        """JSON of everything an outcome depends on: the parameters' bits, how they compute, the tokenizer."""
        sums, _ = jax.device_get(checkpoint.checks(devices.on_each(self.params)[0]))
        compute = self.config.compute
        return {
            "params": [int(value) for value in sums.values()],
            "compute": {"dtype": compute.dtype, "forward": compute.forward, "head": compute.head},
            "tokenizer": self.tokenizer.fingerprint,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a model: --run or --hf, which of its checkpoints in which dtype, and on how many devices."""
    parser.add_argument("--run", type=cli.path, help="run folder that nanojax.train wrote")
    parser.add_argument("--hf", type=cli.path, help="folder of a Hugging Face or nanochat checkpoint, instead of --run")
    parser.add_argument("--step", type=int, help="checkpoint of this step; default: the newest")
    parser.add_argument(
        "--dtype", choices=["f32", "bf16", "stored"], help="default: f32 on a CPU, as stored on other devices"
    )
    parser.add_argument(
        "--devices", default="1", type=devices.number, help="devices that share the work: a number, or all (1)"
    )


def load(
    run: str | None, hf: str | None, dtype: str | None, step: int | None, out: str | None = None, number: str = "1"
) -> Subject:
    """The model behind --run or --hf on `number` devices. UserError when neither or both are given, or it cannot be read."""
    if (run is None) == (hf is None):
        raise UserError("give either --run=DIR (a run folder) or --hf=FOLDER (a Hugging Face or nanochat checkpoint)")
    where = devices.chosen(number)
    dtype = dtype or ("f32" if jax.default_backend() == "cpu" else "stored")
    if run is not None:
        config, params, tokenizer, step = checkpoint.load(run, None if dtype == "stored" else dtype, step)
        params = devices.spread(params, where)
        return Subject(config, params, tokenizer, Path(run).name, step, Path(out or run) / "evals")
    found = interop.load(Path(str(hf)), step=step)
    config, params = interop.as_dtype(found.config, found.params, dtype)
    params = devices.spread(params, where)
    kept = Path(out) / "evals" if out else None  # the folder is another program's
    return Subject(config, params, found.tokenizer, found.config.name, found.step, kept)
