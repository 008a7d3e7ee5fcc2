"""nanochat's checkpoints of July 2026: known by their tensors, padded as nanochat pads, the same logits, nothing between read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import numpy_gpt2026 as oracle

from nanojax import model
from nanojax.cli import UserError
from nanojax.config import Config, Stored
from nanojax.config_rules import resolve
from nanojax.interop import __main__ as interop
from nanojax.interop import convert, layouts, to_run, torch_file
from nanojax.run import checkpoint
from nanojax.tokenizer import Tokenizer, train

TEXT = "the people of this great nation have met in peace; the law will serve every state 1837 ünïté\n  twice " * 20
V, T, WIDTH, HEAD_DIM, SHORT = 300, 256, 64, 32, 128
PADDED = 320


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(iter([TEXT]), V)


def theirs(depth: int, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any], Any]:
    """(tensors, model_config) as nanochat saves them, every row random, padding too; and the oracle's parameters, cut to V."""
    padded = oracle.random_params(np.random.default_rng(seed), depth, PADDED, HEAD_DIM, WIDTH)
    f32 = lambda a: np.asarray(a, np.float32)
    bf16 = lambda a: np.asarray(a, np.float32).astype(layouts.BF16)
    tensors = {
        "resid_lambdas": f32(padded["residual"]),
        "x0_lambdas": f32(padded["first"]),
        "smear_lambda": f32(padded["smear"]),
        "backout_lambda": f32(padded["backout"]),
        "transformer.wte.weight": bf16(padded["embed"]),
    }
    for i, w in enumerate(padded["blocks"]):
        at = f"transformer.h.{i}"
        tensors |= {f"{at}.attn.c_{part}.weight": f32(w[part]) for part in "qkv"}
        tensors[f"{at}.attn.c_proj.weight"] = f32(w["o"])
        if "value" in w:
            tensors[f"{at}.attn.ve_gate.weight"] = f32(w["gate"])
            tensors[f"value_embeds.{i}.weight"] = bf16(w["value"])
        tensors[f"{at}.mlp.c_fc.weight"] = f32(w["up"])
        tensors[f"{at}.mlp.c_proj.weight"] = f32(w["down"])
    tensors |= {"lm_head.weight": f32(padded["head"]), "smear_gate.weight": f32(padded["smear_gate"])}
    sizes = {"sequence_len": T, "vocab_size": V, "n_layer": depth, "n_head": 2, "n_kv_head": 2, "n_embd": WIDTH}
    blocks = tuple(
        w | ({"value": np.asarray(bf16(w["value"])[:V], np.float64)} if "value" in w else {}) for w in padded["blocks"]
    )
    cut = padded | {"embed": np.asarray(bf16(padded["embed"])[:V], np.float64), "head": padded["head"][:V]}
    return tensors, sizes | {"window_pattern": "SSSL"}, cut | {"blocks": blocks}


def written(folder: Path, tensors: dict[str, np.ndarray], sizes: dict[str, Any], tokenizer: Tokenizer) -> Path:
    """A folder as nanochat writes it."""
    folder.mkdir(exist_ok=True)
    listed = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    torch_file.write(folder / "model_000007.pt", listed, tensors.values())
    (folder / "meta_000007.json").write_text(json.dumps({"step": 7, "model_config": sizes, "user_config": {}}))
    tokenizer.save(folder / "tokenizer")
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        convert.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("depth", [3, 4])
def test_logits_of_an_import_equal_numpy(depth: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At odd and even depth, to 1e-5 relative in f32, over rows twice as long as the window; logits have V columns."""
    tensors, sizes, params = theirs(depth)
    to_run(convert.load(written(tmp_path / "n", tensors, sizes, tokenizer)), tmp_path / "run")
    config, ours, _ = checkpoint.load_params(tmp_path / "run")
    assert (config.model.family, config.model.window, config.stored.blocks) == ("2026", SHORT, "f32")
    assert (config.stored.embed, config.stored.value, config.stored.head) == ("bf16", "bf16", "f32")
    tokens = np.random.default_rng(1).integers(0, V, (1, T))
    got = np.asarray(jax.jit(model.forward, static_argnums=0)(config, ours, jnp.asarray(tokens)))
    want = oracle.logits(params, tokens, oracle.Model(HEAD_DIM, SHORT))
    assert got.shape == want.shape == (1, T, V)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_round_trip_gives_nanochats_file_back(depth: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Import, then export: the same names, shapes, dtypes, model_config and bits, but rows of padding, which are zeros."""
    tensors, sizes, _ = theirs(depth)
    found = convert.load(written(tmp_path / "a", tensors, sizes, tokenizer))
    convert.export_nanochat(tmp_path / "b", found.config, found.params, tokenizer, 7)
    back = torch_file.read(tmp_path / "b" / "model_000007.pt")
    assert set(back) == set(tensors)
    for name, array in tensors.items():
        rows = V if array.shape[0] == PADDED else len(array)
        assert (back[name].shape, back[name].dtype) == (array.shape, array.dtype), name
        assert np.asarray(back[name][:rows]).tobytes() == array[:rows].tobytes(), name
        assert not np.asarray(back[name][rows:], np.float32).any()
    assert json.loads((tmp_path / "b" / "meta_000007.json").read_text())["model_config"] == sizes


@pytest.mark.parametrize(
    ("given", "windows", "pattern"),
    [("SSSL", SHORT, "SSSL"), ("sssl", SHORT, "SSSL"), ("SSS", SHORT, "SSSL"), ("L", T, "L"), (None, T, "L")],
)
def test_windows_that_can_be_read(
    given: str | None, windows: int, pattern: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Any spelling of the recipe's windows, and none at all, which nanochat takes where there is no pattern; and back."""
    tensors, sizes, _ = theirs(3)
    sizes = {key: value for key, value in sizes.items() if key != "window_pattern"}
    sizes |= {} if given is None else {"window_pattern": given}
    found = convert.load(written(tmp_path / "a", tensors, sizes, tokenizer))
    assert found.config.model.window == windows
    convert.export_nanochat(tmp_path / "b", found.config, found.params, tokenizer, 7)
    assert json.loads((tmp_path / "b" / "meta_000007.json").read_text())["model_config"]["window_pattern"] == pattern


OLD = {"resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda", "smear_gate.weight"}


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ({"smear_lambda", "smear_gate.weight", "backout_lambda"}, "but not smear_gate, smear_lambda, backout_lambda"),
        ({"backout_lambda"}, "has resid_lambdas, x0_lambdas, value_embeds, ve_gate, smear_gate, smear_lambda but not"),
        (
            OLD - {"resid_lambdas", "x0_lambdas"} | {"value_embeds.2.weight", "value_embeds.0.weight"},
            "not value_embeds",
        ),
        ({"resid_lambdas"}, "but not resid_lambdas"),
        ({"value_embeds.0.weight"}, "missing value_embeds.0.weight"),
        ({"transformer.wte.weight"}, "missing transformer.wte.weight"),
        ({"transformer.h.2.attn.ve_gate.weight"}, "missing transformer.h.2.attn.ve_gate.weight"),
        (OLD | {"value_embeds.2.weight", "value_embeds.0.weight"}, "has ve_gate but not resid_lambdas"),
    ],
)
def test_models_between_are_refused_by_name(lost: set[str], named: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Without smear and backout, without value embeddings, and so on: one line with what is there and what is not."""
    tensors, sizes, _ = theirs(3)
    kept = {name: array for name, array in tensors.items() if name not in lost}
    assert named in refusal(written(tmp_path / "n", kept, sizes, tokenizer))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window_pattern": "SSL"}, "window_pattern SSL; of nanochat of July 2026 only SSSL and L"),
        ({"window_pattern": "SL"}, "window_pattern SL"),
        ({"window_pattern": "M"}, "window_pattern is 'M'"),
        ({"window_pattern": ""}, "window_pattern is ''"),
        ({"window_pattern": 4}, "window_pattern is 4"),
        ({"n_kv_head": 1}, "grouped-query"),
        ({"vocab_size": 321}, "has 320 rows for a vocabulary of 321, which nanochat pads to 384"),
        ({"vocab_size": 256}, "has 320 rows for a vocabulary of 256, which nanochat pads to 256"),
        ({"n_layer": 5}, "missing"),
    ],
)
def test_other_settings_are_refused_by_name(
    change: dict[str, Any], named: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Patterns, grouped heads and paddings that our model cannot honour: one line, instead of silently other logits."""
    tensors, sizes, _ = theirs(4)
    assert named in refusal(written(tmp_path / "n", tensors, sizes | change, tokenizer))


def test_tables_of_other_sizes_are_refused_by_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Unpadded tables, a table that is padded otherwise, and gates of 32 channels, as before March 2026."""
    tensors, sizes, _ = theirs(3)
    wide = {"transformer.h.2.attn.ve_gate.weight": np.ones((2, 32), np.float32)}
    other = {"value_embeds.2.weight": np.ones((384, WIDTH), np.float32)}
    unpadded = {name: array[:V] for name, array in tensors.items() if array.shape[0] == PADDED}
    for change, named in (
        (wide, "ve_gate.weight has shape [2, 32], expected [2, 12]"),
        (other, "value_embeds.2.weight has shape [384, 64], expected [320, 64]"),
        (unpadded, "has 300 rows for a vocabulary of 300, which nanochat pads to 320"),
    ):
        assert named in refusal(written(tmp_path / "n", tensors | change, sizes, tokenizer))
    tensors["value_embeds.0.weight"] = tensors["value_embeds.0.weight"].astype(np.float32)
    assert "value embeddings of different dtypes (bf16, f32)" in refusal(
        written(tmp_path / "n", tensors, sizes, tokenizer)
    )


@pytest.mark.parametrize("rows", [V, PADDED])
def test_models_of_2025_are_read_padded_too(rows: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """nanochat pads since December 2025, before value embeddings; November's tables are exactly V. Both give V rows."""
    tensors, sizes, _ = theirs(2)
    new = ("resid", "x0", "smear", "backout", "value_embeds")
    old = {name: a for name, a in tensors.items() if not name.startswith(new) and "ve_gate" not in name}
    old = {name: array[:rows] if array.shape[0] == PADDED else array for name, array in old.items()}
    folder = written(tmp_path / "n", old, sizes, tokenizer)
    assert "window_pattern SSSL; of nanochat of November 2025 only L" in refusal(folder)
    del sizes["window_pattern"]
    found = convert.load(written(folder, old, sizes, tokenizer))
    assert (found.config.model.family, found.config.model.rope_base, found.config.model.qk_scale) == ("2025", 1e4, 1.0)
    assert found.params["embed"].tobytes() == old["transformer.wte.weight"][:V].tobytes()
    assert found.params["head"].tobytes() == old["lm_head.weight"][:V].tobytes()


@pytest.mark.parametrize(
    ("change", "to", "named"),
    [
        ({"softcap": 20.0}, "nanochat", "model.softcap is 20; nanochat's code of July 2026 has 15"),
        ({"rope_base": 1e4}, "nanochat", "model.rope_base is 10000; nanochat's code of July 2026 has 100000"),
        ({"qk_scale": 1.15}, "nanochat", "model.qk_scale is 1.15; nanochat's code of July 2026 has 1.2"),
        ({"window": 96}, "nanochat", "model.window is 96; nanochat's code has 128 for rows of 256"),
        ({"without": "smear+backout"}, "nanochat", "model.without is smear+backout"),
        ({"family": "2025", "window": 0, "rope_base": 1e4}, "nanochat", "model.qk_scale is 1.2"),
        ({"family": "2025", "window": 0, "rope_base": 1e4}, "hf", "model.qk_scale is 1.2; transformers' NanoChat"),
        ({}, "hf", "no model of family 2026; export with --to=nanochat"),
    ],
)
def test_exports_refuse_before_they_load(
    change: dict[str, Any], to: str, named: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nanochat's code fixes and transformers lacks: one line, before the weights are read, and no folder."""
    tensors, sizes, _ = theirs(3)
    found = convert.load(written(tmp_path / "n", tensors, sizes, tokenizer))
    own = resolve(dataclasses.replace(found.config, model=dataclasses.replace(found.config.model, **change)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(own)))
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("sys.argv", ["interop", "export", str(tmp_path / "run"), str(tmp_path / "out"), f"--to={to}"])
    with pytest.raises(UserError) as caught:
        interop.main()
    assert named in str(caught.value) and "\n" not in str(caught.value)
    export = convert.export_transformers if to == "hf" else convert.export_nanochat
    with pytest.raises(UserError, match=r"not exported|--to=nanochat"):
        export(tmp_path / "out", own, found.params, tokenizer, *([] if to == "hf" else [7]))
    assert not (tmp_path / "out").exists()


def test_few_numbers_stay_f32(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """--dtype=bf16 narrows matrices and tables; scalars and gates stay f32, also when a file has them in bf16."""
    tensors, sizes, _ = theirs(3)
    found = convert.load(written(tmp_path / "n", tensors, sizes, tokenizer))
    narrow, quantised = convert.floats(found.config.model, found.params, "bf16")
    assert not quantised and narrow["head"].dtype == narrow["blocks"][0]["qkv"].dtype == layouts.BF16
    small = ("residual", "first", "smear", "smear_gate", "backout")
    assert all(narrow[name].tobytes() == found.params[name].tobytes() for name in small)
    assert narrow["blocks"][2]["value_gate"].dtype == np.float32
    all_narrow = {name: array.astype(layouts.BF16) for name, array in tensors.items()}
    again = convert.load(written(tmp_path / "b", all_narrow, sizes, tokenizer))
    assert all(again.params[name].dtype == np.float32 for name in small)
    assert again.config.stored == Stored(blocks="bf16", embed="bf16", value="bf16", head="bf16")
    floats: Config = again.config.in_floats("f32")
    assert (floats.stored.value, floats.stored.blocks) == ("f32", "f32")


@pytest.mark.parametrize(
    "key", ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"]
)
def test_any_value_in_the_meta_file_is_one_line_or_a_model(key: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each key left out, or of another type, sign or size: never another error; sizes that the tensors tell must be right."""
    tensors, sizes, _ = theirs(3)
    folder = written(tmp_path / "n", tensors, sizes, tokenizer)
    path = folder / "meta_000007.json"
    changes = [sizes | {key: value} for value in (None, True, 0, -1, 3, 7, 10**30, 1.5, "", "ß", "SSSLx", [], {}, [64])]
    for changed in [*changes, {name: value for name, value in sizes.items() if name != key}]:
        path.write_text(json.dumps({"model_config": changed}))
        try:
            found = convert.load(folder).config.model
            assert (found.L, found.D, found.V) == (3, WIDTH, V), changed
        except UserError as error:
            assert "\n" not in str(error), changed
