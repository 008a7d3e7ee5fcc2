"""What follows from a config's keys (steps, width, window), and which of them do not go together."""

import dataclasses
import math
from typing import Any

from nanojax import weights
from nanojax.cli import UserError
from nanojax.config import RENAMED, Config, Model, Optim, Train, checked, override


def resolve(config: Config) -> Config:
    """Fills in what follows from the rest (width, steps, tokens, run) and checks that it can run. No jax here."""
    config = _with_sizes(checked(config))
    if config.parallel.coordinator and config.parallel.devices == "1":
        config = override(config, {"parallel.devices": "all"})
    _check_together(config)
    model, train = config.model, config.train
    steps = train.steps or _steps(model, train)
    if steps >= 2**31:
        raise UserError(
            f"--train.steps={steps}: more than 2^31 steps; lower train.tokens or raise train.tokens_per_step"
        )
    run = train.run or f"runs/{config.name or 'run'}"
    train = dataclasses.replace(train, steps=steps, tokens=steps * train.tokens_per_step, run=run)
    return dataclasses.replace(config, train=train)


def _with_sizes(config: Config) -> Config:
    """`config` with the width, the window and the tokens of a step that follow from depth and seq."""
    model, train = config.model, config.train
    window = model.window
    if model.family == "2026" and not window:
        window = math.ceil(model.T / 4 / 128) * 128
    model = dataclasses.replace(model, width=model.D, window=window)
    if not train.tokens_per_step and config.data.kind == "rollouts":
        rl = config.rl
        train = dataclasses.replace(train, tokens_per_step=rl.questions * rl.samples * rl.row)
    if not train.tokens_per_step:
        train = dataclasses.replace(train, tokens_per_step=weights.tokens_per_step(model, _twelve(model)))
    return dataclasses.replace(config, model=model, train=train)


def _twelve(model: Model) -> Model:
    """The d12 with the same heads and vocabulary, to which nanochat's scaling laws refer."""
    return dataclasses.replace(model, depth=12, width=0)


def matrix_decay(config: Config) -> float:
    """Muon's weight decay at the first step: optim.matrix_decay scaled from d12 as nanochat does."""
    ratio = weights.scaling_parameters(_twelve(config.model)) / weights.scaling_parameters(config.model)
    return config.optim.matrix_decay * math.sqrt(config.train.tokens_per_step / 2**19) * ratio


def _steps(model: Model, train: Train) -> int:
    """Updates that train.tokens, train.ratio or train.tokens_per_param ask for."""
    if train.ratio and not train.tokens:  # rounded down, as nanochat does
        return max(1, int(train.ratio * weights.scaling_parameters(model) // train.tokens_per_step))
    return math.ceil((train.tokens or train.tokens_per_param * model.parameters) / train.tokens_per_step)


def _check_together(config: Config) -> None:
    """UserError for the first key whose value does not go with another key's."""
    model, train, optim, compute = config.model, config.train, config.optim, config.compute
    rows, of_row = train.microbatch * config.row, "rl.row" if config.data.kind == "rollouts" else "model.seq"
    if train.tokens_per_step % rows:
        raise UserError(
            f"--train.tokens_per_step={train.tokens_per_step}: not a multiple of train.microbatch*{of_row} = {rows}; "
            f"try {max(1, round(train.tokens_per_step / rows)) * rows}"
        )
    if config.data.kind == "rollouts":
        _check_rollouts(config)
    if optim.warmup < 1 and optim.warmup + optim.warmdown > 1:
        raise UserError(
            f"--optim.warmup={optim.warmup}: warmup and warmdown ({optim.warmdown}) together exceed the whole run"
        )
    _check_family(config)
    if model.head_dim % 2:
        raise UserError(f"--model.head_dim={model.head_dim}: rotary embedding needs an even head_dim")
    if model.D % model.head_dim:
        raise UserError(f"--model.width={model.D}: not a multiple of model.head_dim={model.head_dim}")
    if model.parameters > 10**12:
        raise UserError(
            f"--model.depth={model.depth}: {model.parameters:,} parameters; choose depth, width and vocab below 10^12"
        )
    if rows % compute.loss_chunk and compute.loss_chunk < rows:
        raise UserError(
            f"--compute.loss_chunk={compute.loss_chunk}: must divide the microbatch's {rows} tokens (train.microbatch*{of_row})"
        )
    packed = ("int4", "nf4", "int3", "b2.67")
    if model.D % 64 and (config.stored.blocks in packed or config.stored.momentum in packed):
        raise UserError(
            f"--model.width={model.D}: formats below 8 bits have one scale per 64 values; choose a multiple of 64"
        )
    if config.several:
        _check_devices(config)
    if config.accumulate.blocks == "momentum":
        _check_accumulating_into_momentum(config)
    if optim.steps_before and not train.init:
        raise UserError(f"--optim.steps_before={optim.steps_before}: momenta come from another run; set --train.init")


def _check_rollouts(config: Config) -> None:
    """UserError for rollouts that do not fit the model's sequence, the step, or each other."""
    rl, train = config.rl, config.train
    if rl.row > config.model.T:
        raise UserError(f"--rl.row={rl.row}: longer than the model's sequence of {config.model.T}; choose less")
    if rl.tokens >= rl.row:
        raise UserError(f"--rl.tokens={rl.tokens}: leaves no room for a question in --rl.row={rl.row}; choose less")
    if rl.rows % rl.samples and rl.samples % rl.rows:
        raise UserError(f"--rl.rows={rl.rows}: neither a multiple nor a divisor of --rl.samples={rl.samples}")
    step = rl.questions * rl.samples * rl.row
    if train.tokens_per_step != step:
        raise UserError(
            f"--train.tokens_per_step={train.tokens_per_step}: must be rl.questions*rl.samples*rl.row = {step}; omit it"
        )


def _check_devices(config: Config) -> None:
    """UserError where the step cannot be shared by so many devices."""
    key, A = f"--parallel.devices={config.parallel.devices}", config.microbatches
    if config.data.kind == "rollouts":
        raise UserError(f"{key}: reinforcement learning has one device; leave it out")
    if config.accumulate.blocks == "momentum":
        raise UserError(f"{key}: each device needs sums of its own; set --accumulate.blocks to f32 or bf16")
    if config.parallel.devices == "all":
        return
    if not config.parallel.devices.isascii() or not config.parallel.devices.isdecimal() or config.devices < 1:
        raise UserError(f"{key}: expected a number of devices from 1, or all")
    if A % config.devices:
        fits = ", ".join(str(n) for n in range(1, A + 1) if A % n == 0 and n <= 64)
        raise UserError(
            f"{key}: does not divide the step's {A} microbatches of train.microbatch rows; these do: {fits}"
        )


def _check_family(config: Config) -> None:
    """UserError for a key that the config's family does not read, or sizes that it cannot have."""
    model, optim = config.model, config.optim
    if optim.muon == "normuon" and optim.ns_steps > 5:
        raise UserError(f"--optim.ns_steps={optim.ns_steps}: Polar Express has 5 steps; choose at most 5")
    if model.family == "2025":
        for key, value in {"window": model.window, "without": model.without}.items():
            if value:
                raise UserError(f"--model.{key}={value}: only models of --model.family=2026 have it")
        return
    for part in model.left_out:
        if part not in weights.PARTS_2026:
            raise UserError(f"--model.without={model.without}: join names by +: {', '.join(weights.PARTS_2026)}")
    if model.D < weights.SMEAR_CHANNELS:
        raise UserError(f"--model.width={model.D}: the smear reads {weights.SMEAR_CHANNELS} channels; choose more")
    if (optim.beta1, optim.beta2, optim.weight_decay) != (Optim.beta1, Optim.beta2, Optim.weight_decay):
        raise UserError(
            "--optim.beta1, beta2, weight_decay: the groups of --model.family=2026 have their own; omit them"
        )


def _check_accumulating_into_momentum(config: Config) -> None:
    optim, stored = config.optim, config.stored.momentum
    key = "--accumulate.blocks=momentum"
    if optim.matrix == "adamw":
        raise UserError(f"{key}: AdamW needs the gradient by itself; choose f32 or bf16")
    if optim.nesterov:
        raise UserError(f"{key}: only exact for heavy-ball momentum; set --optim.nesterov=false")
    if optim.clip:
        raise UserError(f"{key}: the gradient never exists by itself, so its norm is unknown; set --optim.clip=0")
    if stored not in ("f32", "bf16"):
        raise UserError(f"{key}: gradients cannot be summed in {stored}; set --stored.momentum to f32 or bf16")


def from_dict(stored: dict[str, Any], where: str = "config") -> Config:
    """A resolved config from its JSON. UserError naming `where` if a key is unknown or a type wrong."""
    sections = {section: part for section, part in stored.items() if isinstance(part, dict)}
    flat = {f"{section}.{key}": value for section, part in sections.items() for key, value in part.items()}
    if "train" not in sections:  # an imported model's; the default step need not be whole rows of its length
        flat["train.tokens_per_step"] = flat.get("model.seq", Model.seq)
    renamed = {RENAMED.get(key, key): value for key, value in flat.items()}
    try:
        return resolve(override(Config(name=str(stored.get("name", ""))), renamed))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
