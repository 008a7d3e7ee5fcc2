"""Checkpoints of nanochat and transformers: bit-exact both ways, faults named in one line, pickled code never run."""

import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import numpy_gpt
from safetensors.numpy import load_file, save_file

from nanojax import sample
from nanojax.cli import UserError
from nanojax.config import Compute, Config, Model, Stored, Train
from nanojax.config_rules import resolve
from nanojax.interop import Imported, convert, layouts, to_run, tokenizers, torch_file
from nanojax.interop import __main__ as interop
from nanojax.quant import encode
from nanojax.run import checkpoint, run_folder
from nanojax.tokenizer import Tokenizer, train

TEXT = "the people of this great nation have met in peace; the law will serve every state 1837 ünïté\n  twice " * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(iter([TEXT]), 320)


def _config(
    tokenizer: Tokenizer, blocks: Any = "f32", embed: Any = "f32", head: Any = "f32", vocab: int | None = None
) -> Config:
    m = Model(depth=2, width=64, head_dim=32, vocab=vocab or tokenizer.vocab_size, seq=64)
    stored = Stored(blocks=blocks, embed=embed, head=head)
    return resolve(
        Config(name="x", model=m, stored=stored, compute=Compute(loss_chunk=64), train=Train(tokens_per_step=64))
    )


def _params(config: Config, seed=0):
    s = config.stored
    raw = jax.tree.map(jnp.asarray, numpy_gpt.random_params(seed, config))
    blocks = tuple({n: encode(w, s.blocks) for n, w in layer.items()} for layer in raw["blocks"])
    return {"embed": encode(raw["embed"], s.embed), "blocks": blocks, "head": encode(raw["head"], s.head)}


def _same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def _export(kind: str, out: Path, config: Config, params, tokenizer: Tokenizer) -> None:
    if kind == "nanochat":
        convert.export_nanochat(out, config, params, tokenizer, 7)
    else:
        convert.export_transformers(out, config, params, tokenizer)


@pytest.mark.parametrize("kind", ["nanochat", "hf"])
@pytest.mark.parametrize("forms", [("f32", "f32", "f32"), ("bf16", "bf16", "bf16"), ("f32", "bf16", "f32")])
def test_round_trip_is_bit_exact(kind, forms, tokenizer, tmp_path):
    """Export then load gives every bit back, with sizes, dtypes (also mixed, as nanochat's) and an equal tokenizer."""
    config = _config(tokenizer, *forms)
    params = _params(config)
    _export(kind, tmp_path / "out", config, jax.tree.map(np.asarray, params), tokenizer)
    found = convert.load(tmp_path / "out")
    _same(params, found.params)
    assert found.config.model == config.model and found.config.stored == config.stored
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    assert found.step == (7 if kind == "nanochat" else 0)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_sharded_safetensors_and_a_missing_shard(tokenizer, tmp_path, monkeypatch):
    """A model over the shard size is split with an index and read back bit-exact; a lost shard is named."""
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    config = _config(tokenizer)
    params = _params(config)
    convert.export_transformers(tmp_path / "out", config, jax.tree.map(np.asarray, params), tokenizer)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    _same(params, convert.load(tmp_path / "out").params)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        convert.load(tmp_path / "out")


def test_quantised_parameters_export_as_the_floats_they_stand_for(tokenizer, tmp_path):
    """int8 blocks leave as exactly codes*scale in f32, and their names are returned."""
    config = _config(tokenizer, blocks="int8", embed="bf16")
    params = _params(config)
    floats, quantised = convert.floats(config.model, params)
    assert quantised == ["down", "o", "qkv", "up"]
    q = params["blocks"][1]["up"]
    assert np.array_equal(floats["blocks"][1]["up"], np.asarray(q.codes, np.float32) * np.asarray(q.scale))
    assert floats["embed"].dtype == layouts.BF16
    _export("hf", tmp_path / "out", config, floats, tokenizer)
    assert np.array_equal(convert.load(tmp_path / "out").params["blocks"][1]["up"], floats["blocks"][1]["up"])


@pytest.mark.long
def test_import_makes_a_run_folder_that_loads_and_samples(tokenizer, tmp_path):
    """to_run: load_params returns the same bits, config and step; sampling from it equals sampling from the source."""
    config = _config(tokenizer)
    params = _params(config)
    _export("nanochat", tmp_path / "n", config, jax.tree.map(np.asarray, params), tokenizer)
    found = convert.load(tmp_path / "n")
    to_run(found, tmp_path / "run")
    assert run_folder.available(tmp_path / "run") == [7]
    config2, params2, tokenizer2 = checkpoint.load_params(tmp_path / "run")
    _same(params, params2)
    assert config2.model == config.model and tokenizer2.fingerprint == tokenizer.fingerprint
    ids = [tokenizer.bos, *tokenizer.encode("the people")]
    assert np.array_equal(sample.generate(config, params, ids, 8), sample.generate(config2, params2, ids, 8))
    with pytest.raises(UserError, match="holds checkpoints already"):
        to_run(found, tmp_path / "run")
    with pytest.raises(UserError, match="is not empty"):  # it would overwrite what it was read from
        to_run(found, tmp_path / "n")


def test_missing_extra_and_misshapen_tensors_are_named(tokenizer, tmp_path):
    """Each fault of a tensor list is one line with the tensor's name."""
    config = _config(tokenizer)
    _export("hf", tmp_path / "out", config, jax.tree.map(np.asarray, _params(config)), tokenizer)
    file = tmp_path / "out" / "model.safetensors"
    good = load_file(file)

    def error(change) -> str:
        arrays = dict(good)
        change(arrays)
        save_file(arrays, file)
        with pytest.raises(UserError) as caught:
            convert.load(tmp_path / "out")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "missing model.layers.1.mlp.fc2.weight" in error(lambda a: a.pop("model.layers.1.mlp.fc2.weight"))
    assert "unknown resid_lambdas" in error(lambda a: a.update(resid_lambdas=np.ones(2, np.float32)))
    assert "lm_head.weight has shape [320, 63], expected [320, 64]" in error(
        lambda a: a.update({"lm_head.weight": good["lm_head.weight"][:, :63].copy()})
    )
    assert "expected float32" in error(lambda a: a.update({"lm_head.weight": good["lm_head.weight"].astype("i4")}))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        convert.load(tmp_path / "out")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("model_type", "llama", "only 'nanochat'"),
        ("hidden_act", "gelu", "hidden_act"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope_type"),
        ("final_logit_softcapping", None, "softcap"),
        ("num_key_value_heads", 1, "grouped-query"),
        ("num_attention_heads", 7, "key-value|multiple"),
        ("intermediate_size", 100, "intermediate_size"),
        ("hidden_size", "64", "hidden_size"),
        ("rms_norm_eps", 0.1, "rms_norm_eps"),
        ("vocab_size", 300, "shape"),
    ],
)
def test_configs_of_other_architectures_are_refused(key, value, message, tokenizer, tmp_path):
    """config.json that our model cannot honour: one line naming the key, instead of silently different logits."""
    config = _config(tokenizer)
    _export("hf", tmp_path / "out", config, jax.tree.map(np.asarray, _params(config)), tokenizer)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        convert.load(tmp_path / "out")


class _Touch:
    """Pickles into a call of os.system that creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _pt(path: Path, pickled: bytes, **extra: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        for name, data in extra.items():
            archive.writestr(f"m/data/{name}", data)


def _builtin_eval(path: Path) -> bytes:
    return (
        b"\x80\x02cbuiltins\neval\nX"
        + len(code := f"open({str(path)!r},'w')".encode()).to_bytes(4, "little")
        + code
        + b"\x85R."
    )


ATTACKS = {
    "os.system": lambda p: pickle.dumps({"transformer.wte.weight": _Touch(p)}),
    "eval": _builtin_eval,
    "inst opcode": lambda p: b"(S'touch " + str(p).encode() + b"'\nios\nsystem\n.",
    "torch.load": lambda p: b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "getattr of an allowed name": lambda p: (
        b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x03\x00\x00\x00get\x86R."
    ),
    "dotted name": lambda p: b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_adversarial_pt_is_refused_without_running_it(attack, tokenizer, tmp_path):
    """A .pt or tokenizer.pkl that would run code is refused, by name and in one line, and the code has not run."""
    victim = tmp_path / "victim"
    pickled = ATTACKS[attack](victim)
    if attack in ("os.system", "inst opcode"):  # the attack is real: an ordinary unpickler runs it
        pickle.loads(pickled)
        assert victim.exists()
        victim.unlink()
    config = _config(tokenizer)
    folder = tmp_path / "n"
    _export("nanochat", folder, config, jax.tree.map(np.asarray, _params(config)), tokenizer)
    _pt(folder / "model_000007.pt", pickled)
    with pytest.raises(UserError, match="refused") as caught:
        convert.load(folder)
    assert "\n" not in str(caught.value)
    (folder / "t.pkl").write_bytes(pickled)
    with pytest.raises(UserError, match="refused"):
        tokenizers.load([folder / "t.pkl"])
    assert not victim.exists()


def _tensor_pickle(
    size: str, stride: str, offset="K\x00", count="K\x04", hook="ccollections\nOrderedDict\n)R"
) -> bytes:
    text = (
        "\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        f"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu{count}tQ{offset}{size}{stride}\x89{hook}tRs."
    )
    return text.encode("latin-1")


@pytest.mark.parametrize(
    "pickled",
    [
        _tensor_pickle("K\x05\x85", "K\x01\x85"),  # five values out of four
        _tensor_pickle("K\x02\x85", "M\xff\xff\x85"),  # a stride that leaves the storage
        _tensor_pickle("K\x02\x85", "J\xff\xff\xff\xff\x85"),  # a negative stride
        _tensor_pickle("K\x04\x85", "K\x01\x85", offset="K\x01"),
        _tensor_pickle("K\x04\x85", "K\x01\x85", count="M\xff\xff"),  # a storage longer than the file
        b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",  # not a tensor
        b"\x80\x02K\x01.",  # not a dictionary
        b"\x80\x02}X\xff\xff",  # cut off
        b"",
    ],
)
def test_damaged_pt_is_one_line(pickled, tmp_path):
    """Tensors that reach outside their storage, other objects and cut-off files: UserError in one line."""
    path = tmp_path / "m.pt"
    _pt(path, _tensor_pickle("K\x04\x85", "K\x01\x85"), **{"0": np.arange(4, dtype="f4").tobytes()})
    assert np.array_equal(torch_file.read(path)["a"], [0, 1, 2, 3])  # the template itself is a good file
    _pt(path, pickled, **{"0": np.arange(4, dtype="f4").tobytes()})
    with pytest.raises(UserError, match=r"m\.pt") as caught:
        torch_file.read(path)
    assert "\n" not in str(caught.value)


def test_a_memo_index_out_of_reach_takes_no_memory(tmp_path):
    """One flipped bit of a memo index asks C's unpickler for 8 GiB: both kinds of file are refused before that."""
    pickled = b"\x80\x02}r\xff\xff\xff\x3f."
    _pt(tmp_path / "m.pt", pickled)
    (tmp_path / "t.pkl").write_bytes(pickled)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="memo index 1073741823"):
            torch_file.read(tmp_path / "m.pt")
        with pytest.raises(UserError, match="memo index 1073741823"):
            torch_file.read_tokenizer_pickle(tmp_path / "t.pkl")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_random_damage_never_escapes_as_another_error(tokenizer, tmp_path):
    """300 files with random bytes changed or cut: tensors of the same shapes, or UserError; nothing else."""
    rng = np.random.default_rng(0)
    path = tmp_path / "m.pt"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int64)}
    torch_file.write(path, {n: (a.shape, a.dtype) for n, a in arrays.items()}, arrays.values())
    good = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for _ in range(300):
        bad = good.copy()
        bad[rng.integers(0, len(bad), rng.integers(1, 4))] = rng.integers(0, 256)
        path.write_bytes(bad[: rng.integers(1, len(bad))].tobytes() if rng.random() < 0.2 else bad.tobytes())
        try:
            assert all(isinstance(a, np.ndarray) for a in torch_file.read(path).values())
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_tokenizers_agree_across_formats(tokenizer, tmp_path):
    """tokenizer.pkl and tokenizer.json give back a tokenizer of the same fingerprint; a foreign one is refused."""
    tokenizers.save_nanochat(tokenizer, tmp_path, tokenizer.vocab_size)
    assert tokenizers.load([tmp_path / "tokenizer.pkl"]).fingerprint == tokenizer.fingerprint
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())  # as nanochat's own loader does
    assert encoding.encode_ordinary(TEXT) == tokenizer.encode(TEXT) and encoding.name == "rustbpe"
    assert np.array_equal(torch_file.read(tmp_path / "token_bytes.pt")[""], tokenizer.bytes_per_token())
    tokenizers.save_transformers(tokenizer, tmp_path, 64)
    assert tokenizers.load([tmp_path]).fingerprint == tokenizer.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][1]["content"] = "<|im_start|>"
    content["model"]["vocab"]["<|im_start|>"] = content["model"]["vocab"].pop("<|user_start|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="special tokens"):
        tokenizers.load([tmp_path])
    with pytest.raises(UserError, match="--tokenizer"):
        tokenizers.load([tmp_path / "nowhere"])


def test_merges_rebuild_every_token(tokenizer):
    """Each merge joins two earlier tokens into the next one, which is what tokenizer.json's readers rely on."""
    rank = {t: i for i, t in enumerate(tokenizer.tokens)}
    pairs = tokenizers.merges(tokenizer.tokens)
    assert [a + b for a, b in pairs] == list(tokenizer.tokens[256:])
    assert all(max(rank[a], rank[b]) < rank[a + b] for a, b in pairs)


def test_nanochat_export_refuses_what_it_cannot_say(tokenizer, tmp_path):
    """A wider vocabulary than the tokenizer's, or another softcap, which nanochat's files cannot express."""
    config = _config(tokenizer, vocab=384)
    with pytest.raises(UserError, match="as many ids in the model as in the tokenizer"):
        _export("nanochat", tmp_path / "a", config, jax.tree.map(np.asarray, _params(config)), tokenizer)
    found = Imported(config, _params(config), tokenizer, 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="not empty"):
        _export("hf", tmp_path / "full", config, jax.tree.map(np.asarray, found.params), tokenizer)


@pytest.mark.long
def test_the_command_both_ways(tokenizer, tmp_path):
    """python -m nanojax.interop: import, export, import again gives the first bits; bad input exits 2."""
    config = _config(tokenizer, "bf16", "bf16", "bf16")
    params = _params(config)
    _export("hf", tmp_path / "hf", config, jax.tree.map(np.asarray, params), tokenizer)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = lambda *a: subprocess.run(
        [sys.executable, "-m", "nanojax.interop", *map(str, a)], env=env, capture_output=True, text=True, check=False
    )
    assert run("import", tmp_path / "hf", tmp_path / "run").returncode == 0
    done = run("export", tmp_path / "run", tmp_path / "nc", "--to=nanochat")
    assert done.returncode == 0, done.stderr
    _same(params, convert.load(tmp_path / "nc").params)
    bad = run("import", tmp_path / "nothing", tmp_path / "run2")
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert not (tmp_path / "run2").exists()


def test_a_pt_file_of_another_kind_is_an_error(tmp_path):
    """An old-format (bare pickle) file and a zip of something else are refused with what is expected."""
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"not a zip file of torch\.save"):
        torch_file.read(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.txt", "hello")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"not one that torch\.save wrote"):
        torch_file.read(path)


@pytest.mark.parametrize("kind", ["nanochat", "hf"])
def test_nanochats_odd_depths_go_both_ways(kind, tokenizer, tmp_path):
    """nanochat's d3 is 192 wide with two heads of 96; our own d3 would be 256. It is imported and exported as it is."""
    m = Model(depth=3, width=192, head_dim=96, vocab=tokenizer.vocab_size, seq=64)
    config = resolve(Config(model=m, compute=Compute(loss_chunk=64), train=Train(tokens_per_step=64)))
    params = _params(config)
    _export(kind, tmp_path / "a", config, jax.tree.map(np.asarray, params), tokenizer)
    found = convert.load(tmp_path / "a")
    assert (found.config.model.D, found.config.model.N, found.config.model.H) == (192, 2, 96)
    _export(kind, tmp_path / "b", found.config, found.params, tokenizer)
    _same(params, convert.load(tmp_path / "b").params)
    assert resolve(Config(model=Model(depth=3))).model.D == 256


def test_what_an_import_knows(tokenizer, tmp_path):
    """Fewer ids than rows are noted; null heads and head_dim are the defaults; nothing is said of how it was trained."""
    config = _config(tokenizer, vocab=384)
    _export("hf", tmp_path / "x", config, jax.tree.map(np.asarray, _params(config)), tokenizer)
    path = tmp_path / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"head_dim": None, "num_key_value_heads": None}))
    found = convert.load(tmp_path / "x")
    assert f"its tokenizer has {tokenizer.vocab_size} ids, the model 384" in found.notes[-1]
    to_run(found, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(stored) == {"name", "model", "stored", "compute", "data"} and stored["data"] == {
        "path": "",
        "kind": "text",
    }
    assert run_folder.imported(tmp_path / "run", 0) and run_folder.read_config(tmp_path / "run").model == config.model


def test_an_import_of_any_row_length_is_read_again(tokenizer, tmp_path):
    """Rows of 100 tokens do not divide the default step of 524,288; the run folder is readable all the same."""
    m = Model(depth=1, width=64, head_dim=32, vocab=tokenizer.vocab_size, seq=100)
    config = resolve(Config(model=m, compute=Compute(loss_chunk=100), train=Train(tokens_per_step=100)))
    params = _params(config)
    to_run(Imported(config, params, tokenizer, 0), tmp_path / "run")
    again, params2, _ = checkpoint.load_params(tmp_path / "run")
    assert again.model == config.model
    _same(params, params2)


def test_a_refused_import_leaves_no_folder(tokenizer, tmp_path):
    """NaN in a weight is seen before the run folder is begun."""
    config = _config(tokenizer)
    params = _params(config)
    found = Imported(config, {**params, "head": params["head"] * jnp.nan}, tokenizer, 0)
    with pytest.raises(UserError, match="params/head holds NaN or Inf; not imported"):
        to_run(found, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_export_refuses_before_it_loads(tokenizer, tmp_path, monkeypatch, capsys):
    """A folder with files is refused at once; nanochat's files are printed with the places that nanochat reads them from."""
    config = _config(tokenizer)
    to_run(Imported(config, _params(config), tokenizer, 7), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "load", lambda *_: pytest.fail("loaded"))
        patched.setattr(sys, "argv", ["interop", "export", str(tmp_path / "run"), str(tmp_path / "full")])
        with pytest.raises(UserError, match="full: is not empty"):
            interop.main()
    monkeypatch.setattr(sys, "argv", ["interop", "export", str(tmp_path / "run"), str(tmp_path / "n"), "--to=nanochat"])
    interop.main()
    lines = [line.rsplit("/n/", 1)[1].split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0]: line[-1].split("/nanochat)/")[1] for line in lines} == {
        "meta_000007.json": "base_checkpoints/d2/",
        "model_000007.pt": "base_checkpoints/d2/",
        "token_bytes.pt": "tokenizer/",
        "tokenizer.pkl": "tokenizer/",
    }
