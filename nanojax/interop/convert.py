"""Whole checkpoints: reads nanochat's and transformers' folders into our parameters, writes both, makes run folders.

nanochat: model_NNNNNN.pt, meta_NNNNNN.json, and tokenizer.pkl beside them, in tokenizer/ or in ../../tokenizer.
transformers: config.json, *.safetensors (one or sharded), tokenizer.json.
Float parameters keep dtype and bits. Quantised parameters are exported as the floats they stand for.
"""

import dataclasses
import errno
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanojax import files, weights
from nanojax.cli import UserError, first_line
from nanojax.config import MAX_DEPTH, Compute, Config, Data, Model, Stored, Train, to_dict
from nanojax.config_rules import resolve
from nanojax.interop import layouts, nanochat, tokenizers, torch_file
from nanojax.interop.layouts import BF16
from nanojax.quant import decode, decode_tree, is_stored
from nanojax.run import checkpoint, legacy, run_folder
from nanojax.tokenizer import Tokenizer

SHARD_BYTES = 4 << 30  # of one safetensors file, about where transformers splits too
NORM_EPS = 2.0**-23  # ours and nanochat's; transformers' default of 1e-6 changes outputs by 4e-7 relative
Float = Literal["f32", "bf16"]
DTYPES: dict[Any, Float] = {np.dtype(np.float32): "f32", BF16: "bf16"}
# Names of the sizes: vocabulary, layers, width, heads, key-value heads (default: as many as heads), tokens per row.
NANOCHAT_SIZES = ("vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "sequence_len")
TRANSFORMERS_SIZES = (
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
SAFETENSORS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BF16}
SAFETENSORS |= {name: np.dtype(name.lower()) for name in ("U8", "I8")}
SAFETENSORS |= {f"{kind}{8 * n}": np.dtype(f"{kind.lower()}{n}") for kind in "IU" for n in (2, 4, 8)}
SAFETENSORS |= {"F64": np.dtype(np.float64), "BOOL": np.dtype(np.bool_)}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A foreign checkpoint. `params` are numpy float arrays in our layout; `notes` are for the user."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    step: int
    notes: tuple[str, ...] = ()


def load(folder: Path, tokenizer: Path | None = None, step: int | None = None) -> Imported:
    """Reads a folder of either kind. UserError if it is of neither kind, incomplete or of another architecture."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if any(folder.glob("model_*.pt")):
        return _load_nanochat(folder, tokenizer, step)
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return _load_transformers(folder, tokenizer)
    raise UserError(
        f"{folder}: neither a nanochat checkpoint (model_NNNNNN.pt, meta_NNNNNN.json) nor a Hugging Face one "
        "(config.json, *.safetensors)"
    )


def _config(name: str, model: Model, params: Any) -> Config:
    """A resolved config of these parameters: stored as they are, computing in bf16 only if the blocks are bf16."""
    dtypes: dict[str, set[Float]] = {}
    for weight, row in weights.table(model).items():
        arrays = [layer[weight] for layer in params["blocks"] if weight in layer] if row.layered else [params[weight]]
        dtypes.setdefault(row.stored, set()).update(DTYPES[array.dtype] for array in arrays)
    for key, found in dtypes.items():
        if len(found) != 1:
            what = {"blocks": "block matrices", "value": "value embeddings"}[key]
            raise UserError(f"{name}: {what} of different dtypes ({', '.join(sorted(found))}); convert them to one")
    forms: dict[str, Any] = {key: found.pop() for key, found in dtypes.items() if key != "f32"}
    stored = Stored(**forms)
    compute = Compute(dtype=forms["blocks"], loss_chunk=math.gcd(model.T, 1024))
    train = Train(tokens_per_step=model.T)
    return resolve(Config(name=name, model=model, stored=stored, compute=compute, data=Data(path=""), train=train))


def _known(config: Config) -> dict[str, Any]:
    """What an imported model's config says, as JSON: its training, which would be defaults of ours, is left out."""
    known = to_dict(config)
    return {name: known[name] for name in ("name", "model", "stored", "compute", "data")}


def _json(path: Path) -> dict[str, Any]:
    return files.read_table(path, f"{path}: is missing; copy it beside the weights")


def _whole(where: Path, found: Mapping[str, Any], key: str) -> int:
    value = found.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{where}: {key} is {value!r}, expected a positive whole number")
    return value


def _model(where: Path, found: Mapping[str, Any], names: tuple[str, ...]) -> Model:
    """The sizes in `found` under `names`. UserError if one is missing or they are of a model this project lacks."""
    vocab, depth, width, heads, kv_heads, seq = names
    found = {key: value for key, value in found.items() if value is not None}  # null says the default, as if left out
    D = _whole(where, found, width)
    N = _whole(where, found, heads)
    grouped = _whole(where, {kv_heads: N, **found}, kv_heads)
    if grouped != N:
        raise UserError(f"{where}: {grouped} key-value heads for {N} heads; grouped-query attention is not supported")
    if D % N:
        raise UserError(f"{where}: width {D} is not a multiple of {N} heads")
    L = _whole(where, found, depth)
    if L > MAX_DEPTH:
        raise UserError(f"{where}: {depth} is {L}, more than {MAX_DEPTH} layers")
    return Model(
        depth=L,
        width=D,
        head_dim=D // N,
        vocab=_whole(where, found, vocab),
        seq=_whole(where, found, seq),
    )


def _load_nanochat(folder: Path, tokenizer: Path | None, step: int | None) -> Imported:
    steps = sorted(int(m[1]) for p in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", p.name)))
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise UserError(f"{folder}: no model_NNNNNN.pt of step {step}; there are {steps}")
    meta_path = folder / f"meta_{step:06d}.json"
    sizes = _json(meta_path).get("model_config")
    if not isinstance(sizes, dict):
        raise UserError(f"{meta_path}: no model_config in it")
    plain = _model(meta_path, sizes, NANOCHAT_SIZES)
    path = folder / f"model_{step:06d}.pt"
    found = {name.removeprefix("_orig_mod."): array for name, array in torch_file.read(path).items()}
    model, params = nanochat.read(plain, sizes, found, path)
    places = [tokenizer] if tokenizer else [folder, folder / "tokenizer", folder.parent.parent / "tokenizer"]
    name = folder.name if folder.name not in ("", ".") else "nanochat"
    own, notes = _tokenizer(places, model)
    return Imported(_config(name, model, params), params, own, step, notes)


def _load_transformers(folder: Path, tokenizer: Path | None) -> Imported:
    model, notes = _transformers_config(folder / "config.json")
    try:
        listed: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        read: dict[str, Callable[[str], np.ndarray]] = {}  # name -> the method of its file that reads it
        for path in _safetensors(folder):
            file = safe_open(path, "np")
            for name in file.keys():  # noqa: SIM118  not a dict
                part = file.get_slice(name)
                # Other dtypes, which no layout has, are refused by name in `join`.
                listed[name] = (tuple(part.get_shape()), SAFETENSORS.get(part.get_dtype(), np.dtype(np.void)))
                read[name] = file.get_tensor
        params = layouts.join(layouts.TRANSFORMERS, model, listed, lambda name: read[name](name), folder)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: damaged safetensors file ({error}); fetch it again") from None
    name = folder.name if folder.name not in ("", ".") else "huggingface"
    own, more = _tokenizer([tokenizer or folder], model)
    return Imported(_config(name, model, params), params, own, 0, (*notes, *more))


def _transformers_config(path: Path) -> tuple[Model, tuple[str, ...]]:
    """(sizes, notes for the user) of a config.json. UserError if it is of a model that this project does not have."""
    given = _json(path)
    if given.get("model_type") != "nanochat":
        raise UserError(f"{path}: model_type is {given.get('model_type')!r}, only 'nanochat' can be read")
    fixed = {"hidden_act": "relu2", "attention_bias": False, "tie_word_embeddings": False}
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise UserError(f"{path}: {key} is {given[key]!r}, only {value!r} is supported")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}, expected a table with rope_type and rope_theta")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: rope_type is {rope['rope_type']!r}, only 'default' is supported")
    cap = given.get("final_logit_softcapping", 15.0)
    if not _positive(cap):
        raise UserError(f"{path}: final_logit_softcapping is {cap!r}; a model without a softcap is not supported")
    eps = given.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float) or not 0 <= eps <= 1e-5:
        raise UserError(f"{path}: rms_norm_eps is {eps!r}; only up to 1e-5 is close enough to our 2^-23")
    base = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if not _positive(base):
        raise UserError(f"{path}: rope_theta is {base!r}, expected a number above 0")
    model = dataclasses.replace(_model(path, given, TRANSFORMERS_SIZES), softcap=float(cap), rope_base=float(base))
    if _whole(path, given, "intermediate_size") != model.F:
        raise UserError(
            f"{path}: intermediate_size is {given['intermediate_size']}, expected 4*hidden_size = {model.F}"
        )
    if given.get("head_dim") not in (None, model.H):
        raise UserError(
            f"{path}: head_dim is {given['head_dim']}, expected hidden_size/num_attention_heads = {model.H}"
        )
    same_eps = math.isclose(eps, NORM_EPS, rel_tol=1e-3)
    return model, () if same_eps else (f"its rms_norm_eps is {eps:g}, ours 2^-23",)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _safetensors(folder: Path) -> list[Path]:
    """The files of the weights. UserError naming a shard that the index lists and the folder lacks."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index}: its weight_map does not map tensors to files in this folder")
    files = [folder / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: is missing, though {index.name} names it; fetch it again")
    return files


def _tokenizer(places: list[Path], m: Model) -> tuple[Tokenizer, tuple[str, ...]]:
    """(tokenizer, notes for the user). UserError if the model lacks some of its ids."""
    found = tokenizers.load(places)
    if found.vocab_size > m.V:
        raise UserError(f"{places[0]}: its tokenizer has {found.vocab_size} ids, the model only {m.V}")
    spare = m.V - found.vocab_size
    note = f"its tokenizer has {found.vocab_size} ids, the model {m.V}: the last {spare} rows are never chosen"
    return found, (note,) if spare else ()


def as_dtype(config: Config, params: Any, dtype: str) -> tuple[Config, Any]:
    """(config, params) on the device: stored and computed in `dtype`, f32 or bf16; as they are for "stored"."""
    if dtype == "stored":
        return config, jax.tree.map(jnp.asarray, params)
    return config.in_floats(dtype), decode_tree(params, checkpoint.DTYPES[dtype])


def to_run(found: Imported, run: Path) -> None:
    """Makes a run folder that evaluate, sample, export and train.init accept: config, tokenizer, parameters at `found.step`.

    It holds no optimizer state, so training does not resume from it. UserError if the folder already holds checkpoints or
    the parameters are not finite; then nothing is written.
    """
    check_free(run)
    params = jax.tree.map(jnp.asarray, found.params)
    sums, finite = jax.device_get(checkpoint.checks({"params": params}))
    for path, ok in finite.items():
        if not ok:
            raise UserError(f"{path} holds NaN or Inf; not imported")
    meta = run_folder.sealed(
        {
            "layout": legacy.LAYOUT,
            "step": found.step,
            "data": {},
            "config": _known(found.config),
            "tokenizer": found.tokenizer.fingerprint,
            "checks": {path: int(value) for path, value in sums.items()},
        }
    )
    new = not run.exists()
    try:
        files.write_json(run / "config.json", _known(found.config))
        found.tokenizer.save(run / "tokenizer")
        checkpoint.save_import(run, found.config, found.step, {"params": params, "meta": meta})
    except BaseException:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        raise


def check_free(run: Path) -> None:
    """UserError if the run folder holds anything already, a checkpoint of another program too, or orbax could not write there."""
    run_folder.check_path(run)
    if run_folder.available(run):
        raise UserError(f"{run}: holds checkpoints already; choose another folder")
    if run.is_dir() and any(run.iterdir()):
        raise UserError(f"{run}: is not empty; choose another folder")


def floats(model: Model, params: Any, dtype: str | None = None) -> tuple[Any, list[str]]:
    """(numpy float parameters, names of weights that were quantised). dtype None: floats keep theirs, quantised get f32.

    Weights that are always stored in f32 keep it: they are a few numbers that scale the whole stream.
    """
    table = weights.table(model)
    quantised: dict[str, None] = {}

    def one(path: Any, leaf: Any) -> np.ndarray:
        own = jnp.float32 if is_stored(leaf) else leaf.dtype
        if is_stored(leaf):
            quantised[path[-1].key] = None
        free = table[path[-1].key].stored != "f32"
        return np.asarray(decode(leaf, checkpoint.DTYPES[dtype] if dtype and free else own))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_stored), list(quantised)


def check_export(to: Literal["nanochat", "hf"], m: Model) -> None:
    """UserError for a model that the other program's code does not have."""
    if to == "nanochat":
        nanochat.check(m)
    elif m.family != "2025":
        raise UserError("transformers' NanoChat has no model of family 2026; export with --to=nanochat")
    elif m.qk_scale != 1:
        raise UserError(f"model.qk_scale is {m.qk_scale:g}; transformers' NanoChat has none; not exported")


def export_nanochat(out: Path, config: Config, params: Any, tokenizer: Tokenizer, step: int) -> None:
    """Writes model_NNNNNN.pt, meta_NNNNNN.json, tokenizer.pkl and token_bytes.pt; `params` are numpy floats."""
    m = config.model
    check_export("nanochat", m)
    meta = {"step": step, "model_config": nanochat.model_config(m), "user_config": {}}
    with files.write_folder(out) as folder:
        tokenizers.save_nanochat(tokenizer, folder, m.V)
        files.write_json(folder / f"meta_{step:06d}.json", meta)
        torch_file.write(folder / f"model_{step:06d}.pt", *nanochat.tensors(m, params))


def export_transformers(out: Path, config: Config, params: Any, tokenizer: Tokenizer) -> None:
    """Writes config.json, model.safetensors (or shards and an index), tokenizer files; `params` are numpy floats."""
    m = config.model
    check_export("hf", m)
    kinds = layouts.dtypes(layouts.TRANSFORMERS, params, m)
    with files.write_folder(out) as folder:
        tokenizers.save_transformers(tokenizer, folder, m.T)
        _save_weights(folder, params, kinds, m)
        narrow = all(k == BF16 for k in kinds.values())
        files.write_json(folder / "config.json", _transformers_table(m, tokenizer, narrow, _ends(config, tokenizer)))


def _save_weights(out: Path, params: Any, kinds: dict[str, np.dtype], m: Model) -> None:
    """model.safetensors, or shards and an index where it would be larger than SHARD_BYTES."""
    listed = layouts.shapes(layouts.TRANSFORMERS, m)
    size = {name: math.prod(shape) * kinds[name].itemsize for name, shape in listed.items()}
    if sum(size.values()) <= SHARD_BYTES:
        _save(out / "model.safetensors", dict(zip(listed, layouts.split(layouts.TRANSFORMERS, params, m))))
    else:
        groups = _groups(size)
        arrays = zip(listed, layouts.split(layouts.TRANSFORMERS, params, m))
        weight_map = {}
        for i, group in enumerate(groups, 1):
            file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            _save(out / file, dict(next(arrays) for _ in group))
            weight_map |= dict.fromkeys(group, file)
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        files.write_json(out / "model.safetensors.index.json", index)


def _ends(config: Config, tokenizer: Tokenizer) -> int | list[int]:
    """What ends a text: the begin token of the next; of a fine-tuned model, the end of its answer too."""
    chat = config.data.kind != "text"
    return [tokenizer.special("<|assistant_end|>"), tokenizer.bos] if chat else tokenizer.bos


def _transformers_table(m: Model, tokenizer: Tokenizer, narrow: bool, ends: int | list[int]) -> dict[str, Any]:
    """config.json of transformers' NanoChat; `narrow`: all weights are bf16."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": m.V,
        "hidden_size": m.D,
        "intermediate_size": m.F,
        "num_hidden_layers": m.L,
        "num_attention_heads": m.N,
        "num_key_value_heads": m.N,
        "max_position_embeddings": m.T,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_theta": m.rope_base, "rope_type": "default"},
        "final_logit_softcapping": m.softcap,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.special(tokenizers.PADDING),
        "dtype": "bfloat16" if narrow else "float32",
    }


def _groups(size: Mapping[str, int]) -> list[list[str]]:
    """The names in order, in groups of at most SHARD_BYTES."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, n in size.items():
        if groups[-1] and filled + n > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += n
    return groups


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with files.write_atomic(path) as file:
        try:
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, file.name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(errno.EIO, first_line(error)) from None
