"""What a run is, as frozen dataclasses: every key with its type, default, meaning and bounds in one place.

A config file is plain Python with one function, `get_config() -> Config`; its docstring carries the command and the
plan. `config_files.load` finds it. `config_rules.resolve` fills in what follows from the rest (steps, width) and says which
keys do not go together. This file is long because every key stands in it, with its meaning.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanojax import fields, files, weights
from nanojax.cli import UserError
from nanojax.fields import key as _key

Format = Literal["f32", "bf16", "int8", "int4", "nf4", "int3", "b2.67"]
EdgeFormat = Literal["f32", "bf16", "int8"]
Operands = Literal["float", "int8"]

MAX_DEPTH = 10_000  # the table of weights lists every layer, so a slip of the hand must not ask for 10^9

# old -> new name. An old name in a run's config.json is read as the new one; on a command line it is an error.
RENAMED = {"accumulate.dtype": "accumulate.blocks", "accumulate.edges": "accumulate.embed_head"}


def _harmless(section: Any) -> Any:
    """A section whose keys all have the effect "none" on a resumed run."""
    return dataclasses.field(default=section, metadata={"effect": "none"})


@dataclasses.dataclass(frozen=True)
class Model:
    """nanochat's GPT, where depth is the one dial."""

    family: Literal["2025", "2026"] = _key(
        "2025", "2025 = the d-series of November 2025; 2026 = the recipe of July 2026"
    )
    depth: int = _key(12, "layers L", above=0, at_most=MAX_DEPTH)
    width: int = _key(0, "model width D; 0 = 64*depth, rounded up to a multiple of head_dim", at_least=0)
    head_dim: int = _key(128, "width of one attention head H; cuDNN flash on Ada allows at most 128", above=0)
    vocab: int = _key(65536, "vocabulary V, at least the tokenizer's; token shards are uint16", above=0, at_most=65536)
    seq: int = _key(2048, "tokens per row T", above=0)
    softcap: float = _key(15.0, "logits are softcap*tanh(x/softcap)", above=0)
    rope_base: float = _key(10000.0, "base of the rotary frequencies", above=0)
    qk_scale: float = _key(1.0, "q and k are multiplied by it after their norm", above=0)
    window: int = _key(
        0, "2026: positions before its own that a query of a short layer sees; 0 = seq/4 in whole 128s", at_least=0
    )
    without: str = _key("", "2026: parts left out, joined by +: value, x0, smear, backout")

    @property
    def left_out(self) -> tuple[str, ...]:
        return tuple(part for part in self.without.split("+") if part)

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
    def parameters(self) -> int:
        """All of the model's parameters: d12 185,597,952; d20 560,988,160; d32 1,879,048,192."""
        return weights.parameters(self)

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token as nanochat counts them."""
        return weights.flops_per_token(self)


@dataclasses.dataclass(frozen=True)
class Stored:
    """The formats in which the training state is kept between uses."""

    blocks: Format = _key(
        "f32",
        "block matrices; bf16 and int8 (one f32 scale per row) round stochastically, formats below 8 bits with dither",
    )
    embed: EdgeFormat = _key("f32", "token embedding")
    head: EdgeFormat = _key("f32", "output head")
    value: EdgeFormat = _key("f32", "2026: value embeddings")
    momentum: Format = _key("f32", "Muon momentum; int8 has one f32 scale per 256 values, below 8 bits one bf16 per 64")
    adam: EdgeFormat = _key("f32", "AdamW moments; int8 has one f32 scale per 256 values, of the second one's root")
    remainder: Literal[0, 2, 4] = _key(
        4, "with blocks below 8 bits: bits per weight that carry the rounding error to the next update"
    )


@dataclasses.dataclass(frozen=True)
class Accumulate:
    """Where the gradients of a step's microbatches are summed."""

    blocks: Literal["f32", "bf16", "momentum"] = _key(
        "f32", "block matrices: a buffer in f32 or bf16 (rounded stochastically), or Muon's momentum itself"
    )
    embed_head: Literal["f32", "bf16"] = _key("f32", "embedding and head: f32, or bf16 (rounded stochastically)")


@dataclasses.dataclass(frozen=True)
class Compute:
    """What the matmuls multiply, and what the forward pass keeps for the backward pass."""

    dtype: Literal["f32", "bf16"] = _key("f32", "activations, attention and float matmuls (f32 accumulation)")
    forward: Operands = _key("float", "the blocks' matmuls in the forward pass: float, or int8 x int8 -> int32")
    dx: Operands = _key("float", "gradients of the blocks' matmuls with respect to their inputs")
    dw: Operands = _key("float", "gradients of the blocks' matmuls with respect to their weights")
    head: Operands = _key(
        "float", "the head's three matmuls; in int8 the gradient of the logits is rounded stochastically"
    )
    held: int = _key(
        0,
        "layers whose int8 matrices are also held transposed, for dx, instead of being transposed in each microbatch",
        at_least=0,
        effect="none",
    )
    residuals: str = _key(
        "cheap",
        "kept for backward: inputs (recompute the block), cheap (matmul inputs, attention), all (recompute nothing), "
        "names joined by + (see model.RESIDUALS), or auto (the fastest of these that fits the GPU)",
        effect="rounding",
    )
    attention: Literal["auto", "cudnn", "chunked"] = _key(
        "auto", "auto = cuDNN flash on NVIDIA GPUs, chunked elsewhere", effect="rounding"
    )
    rows: Literal["auto", "pallas", "xla"] = _key(
        "auto",
        "norms and quantised rows: pallas = one pass (needs an NVIDIA GPU), xla = two; auto = pallas on NVIDIA GPUs",
        effect="rounding",
    )
    fused: Literal["auto", "on", "off"] = _key(
        "auto",
        "on an NVIDIA GPU, scales, residual additions and sums inside the matmuls that produce them (XLA's experimental "
        "gemm_fusion_v2); auto = on",
        effect="rounding",
    )
    loss_chunk: int = _key(1024, "tokens whose logits exist at one time", above=0, effect="rounding")


@dataclasses.dataclass(frozen=True)
class Optim:
    """Muon for block matrices, AdamW for the rest, nanochat's rates. The groups are in step/optim.py."""

    matrix: Literal["muon", "adamw"] = _key("muon", "optimizer of the block matrices")
    muon: Literal["plain", "normuon"] = _key(
        "plain", "plain = Keller Jordan's; normuon = equal rows, Polar Express, a second moment per row or column"
    )
    matrix_lr: float = _key(0.02, "Muon: times sqrt(max(1, rows/columns)); AdamW: times (width/768)^-0.5", at_least=0)
    embed_lr: float = _key(0.2, "AdamW, times (width/768)^-0.5", at_least=0)
    head_lr: float = _key(0.004, "AdamW, times (width/768)^-0.5", at_least=0)
    momentum: float = _key(0.95, "Muon", at_least=0, below=1)
    momentum_start: float = _key(0.85, "Muon's momentum at step 0", at_least=0, below=1)
    momentum_warmup: int = _key(300, "steps from momentum_start to momentum", at_least=0)
    momentum_final: float = _key(
        0.0,
        "Muon's momentum at the end, approached during warmdown; 0 = it stays",
        at_least=0,
        below=1,
        effect="schedule",
    )
    nesterov: bool = _key(True, "Nesterov momentum; false = heavy ball, which accumulate.blocks=momentum needs")
    ns_steps: int = _key(5, "Newton-Schulz iterations; normuon has at most 5", above=0)
    beta1: float = _key(0.8, "AdamW; the groups of 2026 have their own", at_least=0, below=1)
    beta2: float = _key(0.95, "AdamW; the groups of 2026 have their own", at_least=0, below=1)
    eps: float = _key(1e-10, "AdamW", above=0)
    weight_decay: float = _key(0.0, "AdamW, decoupled; the groups of 2026 have their own", at_least=0)
    matrix_decay: float = _key(
        0.0, "Muon, cautious, falling to 0 as a cosine; at d12 and 2^19 tokens per step, scaled from there", at_least=0
    )
    clip: float = _key(1.0, "largest global norm of the gradient; 0 = no clipping", at_least=0)
    warmup: float = _key(
        0.0, "linear warm-up: a fraction of the steps, or from 1 on their number", at_least=0, effect="schedule"
    )
    warmdown: float = _key(
        0.2, "fraction of steps of linear decay at the end", at_least=0, at_most=1, effect="schedule"
    )
    final_lr: float = _key(
        0.0, "learning rate at the end, as a fraction of the full rate", at_least=0, at_most=1, effect="schedule"
    )
    decay: Literal["linear", "cosine"] = _key("linear", "how the rate falls during warmdown", effect="schedule")
    peak_lr: float = _key(1.0, "all rates times this; fine-tuning has 0.8", above=0, effect="schedule")
    steps_before: int = _key(
        0, "updates that the momenta have seen, which are taken over from train.init; 0 = fresh momenta", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokens and their tokenizer. The folder may move: a resumed run compares the shards themselves."""

    path: str = _key(
        "data/fineweb",
        "folder that `python -m nanojax.data` or nanojax.tasks wrote; of rollouts: a task, or a Python file",
        effect="none",
        path=True,
    )
    kind: Literal["text", "conversations", "rollouts"] = _key(
        "text",
        "text = token shards; conversations = prepared ones, of which only supervised tokens are learnt; rollouts = the "
        "model's own answers (nanojax.rl)",
    )


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What data.kind=rollouts asks of the model at each step."""

    questions: int = _key(16, "questions of a step", above=0)
    samples: int = _key(16, "answers to each of them", above=1)
    tokens: int = _key(256, "tokens of an answer at most", above=0)
    row: int = _key(512, "tokens of a question and its answer at most: the row that is trained", above=1)
    temperature: float = _key(1.0, "answers are drawn at it; 1 = as the model's own probabilities are", above=0)
    top_k: int = _key(0, "answers are drawn among so many likeliest tokens; 0 = all", at_least=0)
    rows: int = _key(16, "answers that are written together", above=0, effect="rounding")
    source: str = _key("texts/chat", "folder with the hub's tasks", effect="none", path=True)
    words: str = _key("", "text with the words to spell; empty = those of the tokenizer", effect="none", path=True)
    held_out: int = _key(256, "held-out questions that an evaluation asks; 0 = all", at_least=0, effect="none")
    held_out_samples: int = _key(
        8, "answers drawn to each of them, besides the greedy one; 0 = none", at_least=0, effect="none"
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how large a batch, and where."""

    run: str = _key("", "run folder; empty = runs/<config name>", effect="none", path=True)
    init: str = _key(
        "",
        "run folder whose weights a new run starts from (momenta: optim.steps_before); empty = random weights",
        path=True,
    )
    extend: int = _key(
        0, "step of a checkpoint: go on from it with other steps or another schedule; 0 = no", at_least=0, effect="none"
    )
    steps: int = _key(0, "updates; 0 = from tokens", at_least=0, effect="schedule")
    # what these three do, train.steps shows
    tokens: int = _key(0, "tokens to train on; 0 = from ratio or tokens_per_param", at_least=0, effect="none")
    ratio: float = _key(
        0.0,
        "tokens per parameter of the layers' matrices and the head; 0 = tokens_per_param of all",
        at_least=0,
        effect="none",
    )
    tokens_per_param: float = _key(20.0, "used when steps, tokens and ratio are 0", above=0, effect="none")
    tokens_per_step: int = _key(
        524288, "tokens of one update; 0 = all of the rollouts, else nanochat's scaling law (weights.py)", at_least=0
    )
    microbatch: int = _key(1, "rows of one forward and backward pass", above=0, effect="rounding")
    seed: int = _key(0, "parameters, rounding and data order follow from it; below 2^32", at_least=0, below=2**32)
    log_every: int = _key(1, "steps between two lines of metrics", above=0, effect="none")
    tensorboard: bool = _key(True, "also write TensorBoard events", effect="none")
    stall_minutes: float = _key(
        30.0, "a step, save or evaluation that takes longer ends the process; 0 = never", at_least=0, effect="none"
    )


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The devices that share each step, and the processes that they belong to (docs/several-cards.md)."""

    devices: str = _key(
        "1", "devices of all processes that share each step's microbatches: a number, or all", effect="rounding"
    )
    coordinator: str = _key(
        "", "HOST:PORT of process 0, or auto = what SLURM or Open MPI say; empty = one process", effect="none"
    )
    processes: int = _key(1, "processes in all; with auto what started them says it", above=0, effect="rounding")
    process: int = _key(
        0, "which of them this one is, from 0; 0 leads, and has the run folder", at_least=0, effect="none"
    )
    wait: float = _key(300.0, "seconds for which a starting process waits for the others", above=0, effect="none")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Validation during training."""

    every: int = _key(250, "steps between evaluations; 0 = only at the end", at_least=0)
    tokens: int = _key(1 << 20, "validation tokens used; 0 = all", at_least=0)
    prompt: str = _key("The", "start of the sample text printed at each evaluation; empty = no sample")
    sample_tokens: int = _key(64, "tokens of that sample", at_least=0)
    core_every: int = _key(0, "steps between CORE evaluations, and one at the end; 0 = none", at_least=0)
    core_per_task: int = _key(100, "examples of each of its 22 tasks; 0 = all", at_least=0)
    core_bundle: str = _key("eval_bundle", "folder of nanochat's unpacked eval_bundle.zip", path=True)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Orbax checkpoints in the run folder."""

    every: int = _key(1000, "steps between saves; 0 = only at the end", at_least=0)
    keep_last: int = _key(2, "newest checkpoints kept", above=0)
    keep_every: int = _key(0, "steps between checkpoints that are never deleted; 0 = none", at_least=0)


@dataclasses.dataclass(frozen=True)
class Profile:
    """A jax profiler trace of a few steps."""

    start: int = _key(-1, "first traced step; -1 = no trace")
    steps: int = _key(3, "traced steps", above=0)


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
    rl: Rollouts = Rollouts()
    train: Train = Train()
    parallel: Parallel = Parallel()
    eval: Eval = _harmless(Eval())
    checkpoint: Checkpoint = _harmless(Checkpoint())
    profile: Profile = _harmless(Profile())

    def in_floats(self, dtype: str) -> "Config":
        """The same model with its parameters stored in `dtype`, "f32" or "bf16", and every matmul computed in it."""
        form: Any = dtype
        stored = dataclasses.replace(self.stored, blocks=form, embed=form, head=form, value=form)
        compute = dataclasses.replace(self.compute, dtype=form, forward="float", dx="float", dw="float", head="float")
        return dataclasses.replace(self, stored=stored, compute=compute)

    def without_gpu(self) -> "Config":
        """The same, with what only an NVIDIA GPU computes left to the machine."""
        c = self.compute
        attention = "auto" if c.attention == "cudnn" else c.attention
        rows = "auto" if c.rows == "pallas" else c.rows
        return dataclasses.replace(self, compute=dataclasses.replace(c, attention=attention, rows=rows))

    def stored_as(self, weight: weights.Weight) -> Format:
        """The format in which the weight is stored."""
        return "f32" if weight.stored == "f32" else getattr(self.stored, weight.stored)

    def summed_as(self, weight: weights.Weight) -> str:
        """Where the weight's gradients are summed: f32, bf16 or momentum."""
        return "f32" if weight.accumulate == "f32" else getattr(self.accumulate, weight.accumulate)

    @property
    def row(self) -> int:
        """Tokens of a training row: model.seq, or rl.row of rollouts."""
        return self.rl.row if self.data.kind == "rollouts" else self.model.T

    @property
    def microbatches(self) -> int:
        """A, the microbatches whose gradients one step sums."""
        return self.train.tokens_per_step // (self.train.microbatch * self.row)

    @property
    def several(self) -> bool:
        """Whether more than one device shares a step."""
        return self.parallel.devices != "1"

    @property
    def devices(self) -> int:
        """How many devices share a step, once parallel.devices is a number."""
        return int(self.parallel.devices)

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """[A, B, T+1], the shape of one step's tokens: A microbatches of B rows, each T inputs and one last target."""
        return self.microbatches, self.train.microbatch, self.row + 1


class Key(NamedTuple):
    """A settable key as it stands in a config."""

    type: Any
    value: Any
    doc: str


def _fields(config: Config) -> Iterator[tuple[str, dataclasses.Field, dataclasses.Field, Any]]:
    """(section.key, field of the section, field of the key, value) of every settable key."""
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if dataclasses.is_dataclass(part):
            for field in dataclasses.fields(part):
                yield f"{section.name}.{field.name}", section, field, getattr(part, field.name)


def keys(config: Config) -> dict[str, Key]:
    """Every settable key by its name `section.key`."""
    return {name: Key(field.type, value, field.metadata["doc"]) for name, _, field, value in _fields(config)}


def paths() -> list[str]:
    """The keys whose values are paths, each machine's own."""
    return [name for name, _, field, _ in _fields(Config()) if field.metadata["path"]]


def changes(earlier: Config, now: Config, effect: fields.Effect) -> dict[str, tuple[Any, Any]]:
    """key -> (earlier value, value now) of every changed key that has this effect on a resumed run."""
    before = keys(earlier)
    return {
        name: (before[name].value, value)
        for name, section, field, value in _fields(now)
        if value != before[name].value and section.metadata.get("effect", field.metadata["effect"]) == effect
    }


def describe(config: Config) -> str:
    """The table of --help: key, type, value, meaning."""
    return "\n".join(
        f"  {f'--{name}={key.value}':<36} {fields.type_name(key.type)}: {key.doc}" for name, key in keys(config).items()
    )


def override(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with `{"section.key": value}` applied; values may be text. UserError on an unknown key or wrong type."""
    known = keys(config)
    for key, value in changes.items():
        if key not in known:
            raise unknown(key, known)
        config = _with(config, key, fields.convert(key, known[key].type, value))
    return config


def _with(config: Config, key: str, value: Any) -> Config:
    section, name = key.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def unknown(key: str, known: dict[str, Key]) -> UserError:
    """The error of a key that is not there: what it is called now, or which ones are near."""
    if key in RENAMED:
        return UserError(f"--{key}: no such key; it is called {RENAMED[key]} now")
    tails = {name.split(".")[1]: name for name in known}
    near = difflib.get_close_matches(key, known, 3, 0.5)
    near = near or [tails[tail] for tail in difflib.get_close_matches(key, tails, 3, 0.6)]
    return UserError(
        f"--{key}: no such key; " + (f"did you mean {', '.join(near)}?" if near else "--help lists them all")
    )


def checked(config: Config) -> Config:
    """`config` with every key of its type and in its range, each by itself. UserError names the one that is not."""
    empty = Config()
    for section in dataclasses.fields(empty):
        part, expected = getattr(config, section.name), type(getattr(empty, section.name))
        if not isinstance(part, expected):
            raise UserError(f"{section.name}: is of type {type(part).__name__}, expected {expected.__name__}")
    for name, _, field, value in _fields(config):
        config = _with(config, name, fields.checked(name, field, value))
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """JSON-able; `from_dict` gives the same config back."""
    return dataclasses.asdict(config)


def save(config: Config, path: Path) -> None:
    """Writes the config as JSON, whole or not at all."""
    with files.write_atomic(path) as file:
        file.write((json.dumps(to_dict(config), indent=1) + "\n").encode())
