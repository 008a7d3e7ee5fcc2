"""Frozen dataclasses that say what a run is: loaded by name, overridden by dots, checked before anything compiles.

A config file is plain Python with one function, `get_config() -> Config`; its docstring carries the command and the
plan. `load("d12_4070", ["--model.depth=8"])` finds `configs/d12_4070.py` from any directory, applies the overrides,
fills in what follows from the rest (steps, width) and raises `UserError` with one line if the result cannot run.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from nanojax.cli import UserError

Format = Literal["f32", "bf16", "int8", "int4", "nf4", "int3", "b2.67"]
EdgeFormat = Literal["f32", "bf16", "int8"]
Operands = Literal["float", "int8"]


def _key(default: Any, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Model:
    """nanochat's GPT, where depth is the one dial."""

    depth: int = _key(12, "layers L")
    width: int = _key(0, "model width D; 0 = 64*depth, rounded up to a multiple of head_dim")
    head_dim: int = _key(128, "width of one attention head H; cuDNN flash on Ada allows at most 128")
    vocab: int = _key(65536, "vocabulary V, at least the tokenizer's")
    seq: int = _key(2048, "tokens per row T")
    softcap: float = _key(15.0, "logits are softcap*tanh(x/softcap)")
    rope_base: float = _key(10000.0, "base of the rotary frequencies")

    @property
    def L(self) -> int:
        return self.depth

    @property
    def D(self) -> int:
        return self.width or math.ceil(64 * self.depth / self.head_dim) * self.head_dim

    @property
    def H(self) -> int:
        return self.head_dim

    @property
    def N(self) -> int:
        return self.D // self.head_dim

    @property
    def F(self) -> int:
        return 4 * self.D

    @property
    def V(self) -> int:
        return self.vocab

    @property
    def T(self) -> int:
        return self.seq

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Block matrices as stored, [out, in]."""
        return {"qkv": (3 * self.D, self.D), "o": (self.D, self.D), "up": (self.F, self.D), "down": (self.D, self.F)}

    @property
    def parameters(self) -> int:
        """12*D^2 a layer, embedding and untied head: d12 185,597,952; d20 560,988,160; d32 1,879,048,192."""
        return self.L * sum(a * b for a, b in self.shapes.values()) + 2 * self.V * self.D

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs a token in nanochat's count: 6(N - N_embedding) + 12*L*N*H*T (causality not deducted)."""
        return 6 * (self.parameters - self.V * self.D) + 12 * self.L * self.D * self.T


@dataclasses.dataclass(frozen=True)
class Stored:
    """How state lives in memory between uses."""

    blocks: Format = _key(
        "f32", "block matrices; bf16, int8 (one f32 scale a row) are rounded stochastically, less than 8 bits dithered"
    )
    embed: EdgeFormat = _key("f32", "token embedding")
    head: EdgeFormat = _key("f32", "output head")
    momentum: Format = _key("f32", "Muon momentum; int8 has one f32 scale per 256 values, below that bf16 per 64")
    adam: EdgeFormat = _key("f32", "AdamW moments; int8 is blockwise, second moment by its square root")
    remainder: int = _key(
        4, "with blocks below 8 bits: bits a weight in which what rounding left waits for the next update; 0, 2 or 4"
    )


@dataclasses.dataclass(frozen=True)
class Accumulate:
    """Where the gradients of a step's microbatches are summed."""

    blocks: Literal["f32", "bf16", "momentum"] = _key(
        "f32", "block matrices: a buffer in f32, in bf16 (stochastically rounded), or none: summed into Muon's momentum"
    )
    embed_head: Literal["f32", "bf16"] = _key("f32", "embedding and head: f32, or bf16 (stochastically rounded)")


@dataclasses.dataclass(frozen=True)
class Compute:
    """What the matmuls multiply, and what forward keeps for backward."""

    dtype: Literal["f32", "bf16"] = _key("f32", "activations, attention and float matmuls (f32 accumulation)")
    forward: Operands = _key("float", "trunk matmuls forward: float, or int8 x int8 -> int32")
    dx: Operands = _key("float", "gradient to the inputs of the trunk's linear layers")
    dw: Operands = _key("float", "gradient to the trunk's weights")
    head: Operands = _key("float", "head forward only; its backward stays float: int8 there costs 0.6 nats")
    residuals: str = _key(
        "cheap",
        "kept for backward: inputs (recompute the block), cheap (matmul inputs, attention), all (nothing recomputed), "
        "names joined by + (see model.RESIDUALS), or auto (train, plan: the fastest of these that fits the GPU)",
    )
    attention: Literal["auto", "cudnn", "chunked"] = _key("auto", "auto = cuDNN flash on an NVIDIA GPU, else chunked")
    rows: Literal["auto", "pallas", "xla"] = _key(
        "auto",
        "norms and quantised rows: pallas = one pass (kernels for NVIDIA GPUs), xla = two; auto = by the backend",
    )
    loss_chunk: int = _key(1024, "tokens whose logits exist at one time")


@dataclasses.dataclass(frozen=True)
class Optim:
    """Muon for block matrices, AdamW for embedding and head, nanochat's rates."""

    matrix: Literal["muon", "adamw"] = _key("muon", "optimizer of the block matrices")
    matrix_lr: float = _key(0.02, "Muon, times sqrt(max(1, rows/columns)); or AdamW, times (width/768)^-0.5")
    embed_lr: float = _key(0.2, "AdamW, times (width/768)^-0.5")
    head_lr: float = _key(0.004, "AdamW, times (width/768)^-0.5")
    momentum: float = _key(0.95, "Muon")
    momentum_start: float = _key(0.85, "Muon's momentum at step 0")
    momentum_warmup: int = _key(300, "steps from momentum_start to momentum")
    nesterov: bool = _key(True, "Nesterov momentum; false = heavy ball, which accumulate.blocks=momentum needs")
    ns_steps: int = _key(5, "Newton-Schulz iterations")
    beta1: float = _key(0.8, "AdamW")
    beta2: float = _key(0.95, "AdamW")
    eps: float = _key(1e-10, "AdamW")
    weight_decay: float = _key(0.0, "AdamW, decoupled")
    clip: float = _key(1.0, "largest global norm of the gradient; 0 = no clipping")
    warmup: float = _key(0.0, "fraction of steps of linear warm-up")
    warmdown: float = _key(0.2, "fraction of steps of linear decay at the end")
    final_lr: float = _key(0.0, "learning rate at the end, as a fraction")


@dataclasses.dataclass(frozen=True)
class Data:
    """Token shards and their tokenizer."""

    path: str = _key("data/fineweb", "folder that `python -m nanojax.data` wrote")


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how large a batch, and where."""

    run: str = _key("", "run folder; empty = runs/<config name>")
    steps: int = _key(0, "updates; 0 = from tokens")
    tokens: int = _key(0, "tokens to train on; 0 = tokens_per_param times the parameters")
    tokens_per_param: float = _key(20.0, "used when steps and tokens are 0")
    tokens_per_step: int = _key(524288, "tokens of one update")
    microbatch: int = _key(1, "rows of one forward-backward")
    seed: int = _key(0, "parameters, stochastic rounding and data order follow from it")
    log_every: int = _key(1, "steps between two lines of metrics")
    tensorboard: bool = _key(True, "also write TensorBoard events")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Validation during training."""

    every: int = _key(250, "steps between evaluations; 0 = only at the end")
    tokens: int = _key(1 << 20, "validation tokens used; 0 = all")
    prompt: str = _key("The", "sample text printed at each evaluation starts so; empty = none")
    sample_tokens: int = _key(64, "length of that sample")
    core_every: int = _key(0, "steps between CORE evaluations, one more at the end; 0 = none")
    core_per_task: int = _key(100, "examples of each of its 22 tasks; 0 = all")
    core_bundle: str = _key("eval_bundle", "folder of nanochat's unpacked eval_bundle.zip")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Orbax checkpoints in the run folder."""

    every: int = _key(1000, "steps between saves; 0 = only at the end")
    keep_last: int = _key(2, "newest checkpoints kept")
    keep_every: int = _key(0, "checkpoints of every so many steps are kept for good; 0 = none")


@dataclasses.dataclass(frozen=True)
class Profile:
    """A jax profiler trace of a few steps."""

    start: int = _key(-1, "first traced step; -1 = no trace")
    steps: int = _key(3, "traced steps")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    name: str = _key("", "set by load: the file's name")
    model: Model = Model()
    stored: Stored = Stored()
    accumulate: Accumulate = Accumulate()
    compute: Compute = Compute()
    optim: Optim = Optim()
    data: Data = Data()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    profile: Profile = Profile()

    @property
    def microbatches(self) -> int:
        """Microbatches A of one step."""
        return self.train.tokens_per_step // (self.train.microbatch * self.model.T)

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """[A, B, T+1]: what one step eats, targets included."""
        return self.microbatches, self.train.microbatch, self.model.T + 1


def keys(config: Config) -> dict[str, tuple[Any, Any, str]]:
    """Every settable key: `section.key -> (type, value, meaning)`."""
    out = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                out[f"{section.name}.{f.name}"] = (f.type, getattr(value, f.name), f.metadata["doc"])
    return out


def _type_name(kind: Any) -> str:
    return "|".join(typing.get_args(kind)) if typing.get_origin(kind) is Literal else kind.__name__


def describe(config: Config) -> str:
    """The table of --help: key, type, value, meaning."""
    return "\n".join(
        f"  {f'--{key}={value}':<36} {_type_name(kind)}: {doc}" for key, (kind, value, doc) in keys(config).items()
    )


def _convert(key: str, kind: Any, value: Any) -> Any:
    """`value` (text of the command line, or JSON) as `kind`, or a UserError that names the key."""
    wrong = UserError(f"--{key}={value}: expected {_type_name(kind)}, for example --{key}={{}}")
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"--{key}={value}: choose one of {', '.join(choices)}")
        return value
    if kind is bool:
        table = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() not in table:
            raise UserError(str(wrong).format("true"))
        return table[str(value).lower()]
    if kind is str:
        if not isinstance(value, str) or "\0" in value:
            raise UserError(str(wrong).format("text"))
        return value
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        if kind is float:
            return number
        exact = (
            int(value)
            if isinstance(value, (int, str)) and str(value).lstrip("+-").replace("_", "").isdigit()
            else int(number)
        )
        if (exact != number and abs(exact - number) > abs(exact) * 1e-15) or abs(exact) >= 2**63:
            raise ValueError
        return exact
    except (ValueError, TypeError, OverflowError):
        raise UserError(str(wrong).format("0.5" if kind is float else "8")) from None


def override(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with `{"section.key": value}` applied; values may be text. UserError on an unknown key or wrong type."""
    known = keys(config)
    for key, value in changes.items():
        if key not in known:
            tails = {k.split(".")[1]: k for k in known}
            near = difflib.get_close_matches(key, known, 3, 0.5) or [
                tails[t] for t in difflib.get_close_matches(key, tails, 3, 0.6)
            ]
            raise UserError(
                f"--{key}: no such key; " + (f"did you mean {', '.join(near)}?" if near else "--help lists them all")
            )
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: _convert(key, known[key][0], value)})
        config = dataclasses.replace(config, **{section: part})
    return config


def resolve(config: Config) -> Config:
    """Fills in what follows from the rest (width, steps, tokens, run) and checks that it can run. No jax here."""
    m, t = config.model, config.train
    _check_model(config)
    rows = t.microbatch * m.T
    if t.tokens_per_step <= 0 or t.tokens_per_step % rows:
        raise UserError(
            f"--train.tokens_per_step={t.tokens_per_step}: not a multiple of train.microbatch*model.seq = {rows}; "
            f"try {max(1, round(t.tokens_per_step / rows)) * rows}"
        )
    steps = t.steps or math.ceil((t.tokens or t.tokens_per_param * m.parameters) / t.tokens_per_step)
    if steps >= 2**31:
        raise UserError(
            f"--train.steps={steps}: more than 2^31 steps; lower train.tokens or raise train.tokens_per_step"
        )
    train = dataclasses.replace(
        t, steps=steps, tokens=steps * t.tokens_per_step, run=t.run or f"runs/{config.name or 'run'}"
    )
    return dataclasses.replace(config, model=dataclasses.replace(m, width=m.D), train=train)


def _check_model(config: Config) -> None:
    m, t, o, c = config.model, config.train, config.optim, config.compute
    positive = {"model.depth": m.depth, "model.head_dim": m.head_dim, "model.vocab": m.vocab, "model.seq": m.seq}
    positive |= {"model.softcap": m.softcap, "model.rope_base": m.rope_base, "train.microbatch": t.microbatch}
    positive |= {
        "train.log_every": t.log_every,
        "optim.eps": o.eps,
        "optim.ns_steps": o.ns_steps,
        "compute.loss_chunk": c.loss_chunk,
    }
    positive |= {"profile.steps": config.profile.steps, "checkpoint.keep_last": config.checkpoint.keep_last}
    for key, value in positive.items():
        if value <= 0:
            raise UserError(f"--{key}={value}: must be greater than 0")
    natural = {"model.width": m.width, "train.steps": t.steps, "train.tokens": t.tokens, "train.seed": t.seed}
    natural |= {
        "eval.every": config.eval.every,
        "eval.tokens": config.eval.tokens,
        "eval.sample_tokens": config.eval.sample_tokens,
        "eval.core_every": config.eval.core_every,
        "eval.core_per_task": config.eval.core_per_task,
    }
    natural |= {"checkpoint.every": config.checkpoint.every, "checkpoint.keep_every": config.checkpoint.keep_every}
    natural |= {
        f"optim.{k}": getattr(o, k)
        for k in ("matrix_lr", "embed_lr", "head_lr", "momentum_warmup", "weight_decay", "clip")
    }
    for key, value in natural.items():
        if value < 0:
            raise UserError(f"--{key}={value}: must not be negative")
    for key in ("momentum", "momentum_start", "beta1", "beta2", "warmup", "warmdown", "final_lr"):
        value = getattr(o, key)
        if not 0 <= value <= 1 or (value == 1 and key in ("momentum", "momentum_start", "beta1", "beta2")):
            raise UserError(f"--optim.{key}={value}: must lie between 0 and 1")
    if o.warmup + o.warmdown > 1:
        raise UserError(f"--optim.warmup={o.warmup}: warmup and warmdown ({o.warmdown}) together exceed the whole run")
    if m.head_dim % 2:
        raise UserError(f"--model.head_dim={m.head_dim}: rotary embedding needs an even head_dim")
    if m.D % m.head_dim:
        raise UserError(f"--model.width={m.D}: not a multiple of model.head_dim={m.head_dim}")
    if m.vocab > 65536:
        raise UserError(f"--model.vocab={m.vocab}: token shards are uint16, at most 65536")
    if m.parameters > 10**12:
        raise UserError(
            f"--model.depth={m.depth}: {m.parameters:,} parameters; choose depth, width and vocab below 10^12"
        )
    if t.seed >= 2**32:
        raise UserError(f"--train.seed={t.seed}: must be below 2^32")
    if not t.steps and not t.tokens and t.tokens_per_param <= 0:
        raise UserError("--train.tokens_per_param: must be greater than 0 when train.steps and train.tokens are 0")
    if (t.microbatch * m.seq) % c.loss_chunk and c.loss_chunk < t.microbatch * m.seq:
        raise UserError(
            f"--compute.loss_chunk={c.loss_chunk}: must divide the microbatch's {t.microbatch * m.seq} tokens "
            "(train.microbatch*model.seq)"
        )
    if config.stored.remainder not in (0, 2, 4):
        raise UserError(f"--stored.remainder={config.stored.remainder}: choose 0, 2 or 4 bits")
    packed = ("int4", "nf4", "int3", "b2.67")
    if m.D % 64 and {config.stored.blocks, config.stored.momentum} & set(packed):
        raise UserError(f"--model.width={m.D}: formats below 8 bits have 64 values to a scale; choose a multiple of 64")
    if config.accumulate.blocks == "momentum":
        if o.matrix == "adamw":
            raise UserError("--accumulate.blocks=momentum: AdamW needs the gradient alone; choose f32 or bf16")
        if o.nesterov:
            raise UserError(
                "--accumulate.blocks=momentum: only exact for heavy-ball momentum; set --optim.nesterov=false"
            )
        if o.clip:
            raise UserError("--accumulate.blocks=momentum: the gradient's norm is never seen alone; set --optim.clip=0")
        if config.stored.momentum not in ("f32", "bf16"):
            raise UserError(
                f"--accumulate.blocks=momentum: gradients cannot be summed in {config.stored.momentum}; "
                "set --stored.momentum to f32 or bf16"
            )


def to_dict(config: Config) -> dict[str, Any]:
    """JSON-able; `from_dict` gives the same config back."""
    return dataclasses.asdict(config)


def from_dict(stored: dict[str, Any], where: str = "config") -> Config:
    """A resolved config from its JSON. UserError naming `where` if a key is unknown or a type wrong."""
    flat = {f"{s}.{k}": v for s, part in stored.items() if isinstance(part, dict) for k, v in part.items()}
    try:
        return resolve(override(Config(name=str(stored.get("name", ""))), flat))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def save(config: Config, path: Path) -> None:
    path.write_text(json.dumps(to_dict(config), indent=1) + "\n")


def find(name: str) -> Path:
    """The config file of that name or path. Looks in ./configs, beside the package, and in the installed package."""
    if name.endswith(".py") or os.sep in name:
        if not Path(name).is_file():
            raise UserError(f"--config={name}: no such file")
        return Path(name)
    package = Path(__file__).parent
    folders = [Path("configs"), package.parent / "configs", package / "configs"]
    for folder in folders:
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    names = available()
    near = difflib.get_close_matches(name, names, 3, 0.4)
    raise UserError(
        f"--config={name}: no such config; "
        + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}")
    )


def available() -> list[str]:
    """Names of all configs that `find` can see, sorted."""
    package = Path(__file__).parent
    folders = (Path("configs"), package.parent / "configs", package / "configs")
    return sorted({p.stem for folder in folders for p in folder.glob("*.py") if not p.stem.startswith("_")})


def load_unresolved(name: str) -> Config:
    """The config as its file gives it, nothing filled in."""
    path = find(name)
    spec = importlib.util.spec_from_file_location(f"nanojax_config_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise UserError(
            f"{path}: {type(error).__name__}: {error}; a config file needs get_config() -> Config"
        ) from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, expected nanojax.config.Config")
    return dataclasses.replace(config, name=path.stem)


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Config `name` (or path) with `--section.key=value` overrides, resolved and checked."""
    changes = {}
    for argument in overrides:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument}: expected --section.key=value")
        changes[key] = value
    return resolve(override(load_unresolved(name), changes))
