"""lm-evaluation-harness on our models, offline: its numbers equal those by hand. Needs `pip install lm-eval`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.core_bundle import WORDS
from helpers.serving import served, service_of
from oracles import numpy_gpt

from nanojax.config import Compute, Config, Model, Train
from nanojax.config_rules import resolve
from nanojax.engine.slots import Slots
from nanojax.interop import Imported, to_run
from nanojax.tokenizer import train

pytest.importorskip("lm_eval", reason="pip install lm-eval to run the harness on our models")

TASK = """task: nanojax_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{query}}}}"
{rest}
"""
REST = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]',
    "loglikelihood": 'doc_to_target: " {{choices[0]}}"\nmetric_list: [{metric: perplexity}, {metric: acc}]',
    "loglikelihood_rolling": 'doc_to_target: "{{query}}"\nmetric_list: [{metric: bits_per_byte}]',
    "generate_until": 'doc_to_target: "{{choices[0]}}"\ngeneration_kwargs: {max_gen_toks: 4, until: ["."]}\n'
    "metric_list: [{metric: exact_match}]",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with a run and task files, config, params, tokenizer, documents)."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rng = np.random.default_rng(0)
    say = lambda n: " ".join(rng.choice(WORDS, n))
    tokenizer = train(iter([say(400)]), 300)
    m = Model(depth=1, width=64, head_dim=32, vocab=tokenizer.vocab_size, seq=64)
    config = resolve(Config(model=m, compute=Compute(loss_chunk=64), train=Train(tokens_per_step=64)))
    params = numpy_gpt.random_params(0, config)
    to_run(Imported(config, params, tokenizer, 1), folder / "run")
    docs = [{"query": say(8), "choices": [say(2), say(3), say(1)], "gold": int(rng.integers(0, 3))} for _ in range(12)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    for kind, rest in REST.items():
        text = TASK.format(kind=kind, path=folder / "docs.jsonl", rest=rest)
        if kind == "loglikelihood_rolling":
            text = text.replace('doc_to_text: "{{query}}"', 'doc_to_text: ""')
        (folder / f"{kind}.yaml").write_text(text)
    return folder, config, params, tokenizer, docs


def _log_p(made, context: str, continuation: str) -> float:
    _, config, params, tokenizer, _ = made
    head, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    row = np.array([[tokenizer.bos, *whole]])
    return -float(numpy_gpt.token_losses(params, row[:, :-1], row[:, 1:], config)[0][len(head) :].sum())


def test_the_harness_gives_the_numbers_computed_by_hand(made):
    """All four request types through the command: accuracy, perplexity and bits per byte equal numpy's."""
    folder, *_ = made
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-m", "nanojax.evaluate.lm_eval", f"--run={folder / 'run'}", f"--include={folder}"]
    command += ["--tasks=" + ",".join(f"nanojax_{kind}" for kind in REST), f"--out={folder / 'out.json'}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {
        t: {k.split(",")[0]: v for k, v in r.items()} for t, r in json.loads((folder / "out.json").read_text()).items()
    }
    _hold_by_hand(made, found)


def _hold_by_hand(made, found) -> None:
    """The harness's results are those of numpy."""
    *_, docs = made
    scores = [[_log_p(made, d["query"], " " + c) for c in d["choices"]] for d in docs]
    right = [int(np.argmax(s)) == d["gold"] for s, d in zip(scores, docs)]
    assert found["nanojax_multiple_choice"]["acc"] == pytest.approx(np.mean(right))
    assert found["nanojax_loglikelihood"]["perplexity"] == pytest.approx(
        np.exp(-np.mean([s[0] for s in scores])), rel=1e-4
    )
    nats = -sum(_log_p(made, "", d["query"]) for d in docs)
    size = sum(len(d["query"].encode()) for d in docs)
    bits = found["nanojax_loglikelihood_rolling"]["bits_per_byte"]
    assert bits == pytest.approx(nats / size / np.log(2), rel=1e-4)
    assert found["nanojax_generate_until"]["exact_match"] == 0


def test_the_harness_as_a_client_of_the_server_gives_the_same_numbers(made):
    """local-completions, several requests at a time, with the tokenizer of an export: the same numbers as by hand."""
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]' to ask a server")
    folder, config, params, tokenizer, _ = made
    export = [sys.executable, "-m", "nanojax.interop", "export", str(folder / "run"), str(folder / "export")]
    subprocess.run(export, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, check=True)
    ends = tokenizer.special("<|assistant_end|>"), tokenizer.bos
    engine = Slots(config, jax.tree.map(jnp.asarray, params), 4, config.model.T, tokenizer.vocab_size, ends, -2)
    found = {}
    with served(service_of(engine, tokenizer=tokenizer)) as url:
        for kind in REST:
            # Of a whole text the harness itself puts the begin token before every window.
            bos = "" if kind == "loglikelihood_rolling" else ",add_bos_token=True"
            about = f"model=tiny,base_url={url}/v1/completions,tokenizer={folder / 'export'}{bos}"
            command = [sys.executable, "-m", "lm_eval", "--model=local-completions", f"--include_path={folder}"]
            command += [f"--model_args={about},max_length={config.model.T},num_concurrent=3"]
            command += [f"--tasks=nanojax_{kind}", f"--output_path={folder / 'asked' / kind}"]
            env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            found |= json.loads(next((folder / "asked" / kind).rglob("results*.json")).read_text())["results"]
    _hold_by_hand(made, {t: {k.split(",")[0]: v for k, v in r.items()} for t, r in found.items()})


def test_generation_stops_at_until(made):
    """Greedy text equals numpy's argmax token by token, cut at the first stop string."""
    from nanojax.evaluate.lm_eval import NanojaxLM

    _, config, params, tokenizer, docs = made
    adapter = NanojaxLM(config, jax.tree.map(jnp.asarray, params), tokenizer)
    ids, new = [tokenizer.bos, *tokenizer.encode(docs[0]["query"])], []
    for _ in range(6):
        logits = numpy_gpt.forward(params, np.array([ids + new]), config)[0, -1]
        new.append(int(logits.argmax()))
        if new[-1] == tokenizer.bos:
            new.pop()
            break
    whole = tokenizer.decode(new)
    assert adapter._generate(docs[0]["query"], {"max_gen_toks": 6}) == whole
    stop = whole[len(whole) // 2]
    assert adapter._generate(docs[0]["query"], {"max_gen_toks": 6, "until": [stop]}) == whole.split(stop)[0]
