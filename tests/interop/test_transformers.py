"""Ours against torch and transformers' NanoChat: logits, greedy text, tokenizer, and .pt files of either.

Needs `pip install torch transformers` (CPU builds do); skipped where they are absent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import numpy_gpt

from nanojax import model, sample
from nanojax.config import Compute, Config, Model, Train
from nanojax.config_rules import resolve
from nanojax.interop import as_dtype, convert, layouts, to_run, torch_file
from nanojax.run import checkpoint
from nanojax.tokenizer import train

torch = pytest.importorskip("torch", reason="pip install torch to compare with PyTorch")

TEXT = "the people of this great nation have met in peace; the law will serve every state 1837 ünïté 你好 🌍\n\n x " * 9
SIZES = [(1, 64, 32), (2, 128, 64), (4, 256, 128)]  # depth, width, head_dim


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="pip install transformers to compare with its NanoChat")


@pytest.fixture(scope="module")
def tokenizer():
    return train(iter([TEXT]), 340)


def _model(size, tokenizer, T=96):
    depth, width, head_dim = size
    m = Model(depth=depth, width=width, head_dim=head_dim, vocab=tokenizer.vocab_size, seq=T)
    config = resolve(Config(name="x", model=m, compute=Compute(loss_chunk=T), train=Train(tokens_per_step=T)))
    return config, numpy_gpt.random_params(depth, config)


@pytest.fixture(params=SIZES, ids=str)
def exported(request, transformers, tokenizer, tmp_path):
    """(config, params, transformers' model on the exported folder, the folder)."""
    config, params = _model(request.param, tokenizer)
    convert.export_transformers(tmp_path / "hf", config, params, tokenizer)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(theirs).__name__ == "NanoChatForCausalLM" and theirs.dtype == torch.float32
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return config, params, theirs.eval(), tmp_path / "hf"


def test_logits_of_all_three_agree(exported):
    """Ours, transformers' and numpy's logits agree to 1e-4 in f32, with KV cache and without (the issue's bar)."""
    config, params, theirs, _ = exported
    tokens = np.random.default_rng(0).integers(0, config.model.V, (2, 80)).astype(np.int32)
    oracle = numpy_gpt.forward(params, tokens, config)
    ours = np.asarray(model.forward(config, params, jnp.asarray(tokens)))
    with torch.no_grad():
        full = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        past, parts = None, []
        for start, end in ((0, 70), (70, 71), (71, 80)):
            out = theirs(torch.tensor(tokens[:, start:end], dtype=torch.long), past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits.numpy())
    cache, ours_cached = model.empty_cache(config, 2, 80), []
    for start, end in ((0, 70), (70, 71), (71, 80)):
        logits, cache = model.forward_cached(
            config, params, jnp.asarray(tokens[:, start:end]), cache, jnp.int32(start), None
        )
        ours_cached.append(np.asarray(logits))
    for name, logits in {
        "ours": ours,
        "transformers": full,
        "transformers cached": np.concatenate(parts, 1),
        "ours cached": np.concatenate(ours_cached, 1),
    }.items():
        assert np.abs(logits - oracle).max() < 1e-4, name


def test_greedy_64_tokens_are_equal(exported, tokenizer):
    """A checkpoint exported to safetensors generates in transformers the same greedy 64 tokens as ours."""
    _, _, theirs, folder = exported
    run = folder.parent / "run"
    to_run(convert.load(folder), run)
    loaded_config, loaded, _ = checkpoint.load_params(run)
    prompt = [tokenizer.bos, *tokenizer.encode("the people")]
    ours = sample.generate(loaded_config, loaded, prompt, 64)[0]
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
        )
    assert len(set(ours.tolist())) > 4  # not one token over and over
    assert ours.tolist() == out[0, len(prompt) :].tolist()


def test_transformers_own_folder_is_read(transformers, tokenizer, tmp_path):
    """What transformers itself saves (its config keys, its default eps 1e-6) loads, and gives its logits to 1e-4."""
    config, params = _model((2, 128, 64), tokenizer)
    convert.export_transformers(tmp_path / "a", config, params, tokenizer)
    theirs = transformers.NanoChatForCausalLM.from_pretrained(tmp_path / "a")
    theirs.config.rms_norm_eps = 1e-6
    theirs.save_pretrained(tmp_path / "b")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    found = convert.load(tmp_path / "b")
    assert found.notes and found.tokenizer.fingerprint == tokenizer.fingerprint
    theirs = transformers.NanoChatForCausalLM.from_pretrained(tmp_path / "b").eval()
    tokens = np.random.default_rng(1).integers(0, config.model.V, (1, 64)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(np.asarray(model.forward(found.config, found.params, jnp.asarray(tokens))) - expected).max() < 1e-4


def test_bf16_export_loads_as_bf16(transformers, tokenizer, tmp_path):
    """A bf16 model stays bf16 there, bit by bit."""
    config, params = _model((1, 64, 32), tokenizer)
    _, params = as_dtype(config, params, "bf16")
    convert.export_transformers(tmp_path / "hf", config, jax.tree.map(np.asarray, params), tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    head = theirs.lm_head.weight.detach().view(torch.int16).numpy()
    assert np.array_equal(head, np.asarray(params["head"]).view(np.int16))


def test_tokenizer_json_encodes_alike(transformers, tokenizer, tmp_path):
    """transformers' fast tokenizer gives our ids (begin token in front) and decodes them back, on hard text."""
    config, params = _model((1, 64, 32), tokenizer)
    convert.export_transformers(tmp_path / "hf", config, params, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [
        TEXT,
        "",
        " ",
        "\n\n\n",
        "a\r\n b",
        "12345 6",
        "don't we'LL",
        "é\u0301 \u200b",
        "<|x|>",
        "   tabs\t\t.",
        "日本語",
    ]
    for text in texts:
        assert theirs(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text)], text
        assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.bos_token_id == tokenizer.bos and len(theirs) == tokenizer.vocab_size


def test_torch_reads_what_we_write(tokenizer, tmp_path):
    """torch.load(weights_only=True) of an exported model: nanochat's names, our bits, contiguous tensors."""
    config, params = _model((2, 128, 64), tokenizer)
    params["embed"] = np.asarray(jnp.asarray(params["embed"]).astype(jnp.bfloat16))
    convert.export_nanochat(tmp_path, config, params, tokenizer, 12)
    state = torch.load(tmp_path / "model_000012.pt", weights_only=True, map_location="cpu")
    assert list(state) == list(layouts.shapes(layouts.NANOCHAT, config.model))
    assert state["transformer.wte.weight"].dtype == torch.bfloat16
    assert np.array_equal(state["transformer.wte.weight"].view(torch.int16).numpy(), params["embed"].view(np.int16))
    k = state["transformer.h.1.attn.c_k.weight"]
    assert k.is_contiguous() and np.array_equal(k.numpy(), params["blocks"][1]["qkv"][128:256])
    token_bytes = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert np.array_equal(token_bytes.numpy(), tokenizer.bytes_per_token())


def test_we_read_what_torch_writes(tmp_path):
    """torch.save of offsets, shared storages, transposes, Parameters and every dtype: equal to torch's values."""
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "plain": base.reshape(4, 6),
        "shared": base[6:12],
        "transposed": base.reshape(4, 6).T,
        "bf16": base.to(torch.bfloat16).reshape(2, 12),
        "half": base.half(),
        "int": torch.arange(5, dtype=torch.int32),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }
    torch.save(state, tmp_path / "s.pt")
    found = torch_file.read(tmp_path / "s.pt")
    for name, tensor in state.items():
        expected = tensor.detach().float().numpy()
        assert found[name].shape == expected.shape, name
        assert np.array_equal(found[name].astype(np.float32), expected), name
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a zip file"):
        torch_file.read(tmp_path / "old.pt")


def test_gradients_of_the_oracle_equal_autograd():
    """The numpy oracle's gradients equal torch's autograd of the same formulas in float64, to 1e-10."""
    from types import SimpleNamespace

    c = SimpleNamespace(depth=2, width=32, head_dim=16, vocab=29, softcap=15.0, rope_base=1e4)
    params = numpy_gpt.random_params(0, c)
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 29, (2, 11)), rng.integers(0, 29, (2, 11))
    w = jax.tree.map(lambda a: torch.tensor(a, dtype=torch.float64, requires_grad=True), params)
    norm = lambda x: torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=numpy_gpt.NORM_EPS)
    cos, sin = (torch.tensor(t)[None, :, None] for t in numpy_gpt.rope_tables(11, 16, 1e4))

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos + b * sin, -a * sin + b * cos], -1)

    x = norm(w["embed"][tokens])
    for i in range(2):
        q, k, v = (norm(x) @ w["blocks"][i]["qkv"].T).view(2, 11, 3, 2, 16).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (norm(rotate(q)), norm(rotate(k)), v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(2, 11, 32) @ w["blocks"][i]["o"].T
        x = x + torch.relu(norm(x) @ w["blocks"][i]["up"].T).square() @ w["blocks"][i]["down"].T
    logits = 15 * torch.tanh(norm(x) @ w["head"].T / 15)
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 29), torch.tensor(targets).reshape(-1))
    loss.backward()
    value, grads = numpy_gpt.loss_and_grads(params, tokens, targets, c)
    assert value == pytest.approx(loss.item(), rel=1e-12)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(w)):
        assert np.abs(ours - theirs.grad.numpy()).max() < 1e-10 * max(1, np.abs(ours).max())
