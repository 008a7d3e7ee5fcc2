"""Lets lm-evaluation-harness run its tasks on our models.        python -m nanojax.evaluate.lm_eval

Needs the optional extra: pip install -e '.[lm-eval]'. likelihood.py computes the log-likelihoods: batched, bucketed, and
the continuations of one context together. The begin token stands before every text, as in training. Requests longer
than the model's rows lose tokens from the left.
"""

import collections
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanojax import cli, files, sample, xla
from nanojax.cli import UserError, run_main
from nanojax.config import Config
from nanojax.evaluate import devices, likelihood, subject
from nanojax.evaluate.likelihood import Request
from nanojax.tokenizer import Tokenizer

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
except ImportError:

    def _absent() -> None:
        raise UserError("lm-evaluation-harness is not installed: pip install -e '.[lm-eval]'")

    if __name__ == "__main__":
        run_main(_absent)
    raise

EXAMPLES = """\
  python -m nanojax.evaluate.lm_eval --run=runs/d20 --tasks=arc_easy,hellaswag --limit=200
  python -m nanojax.evaluate.lm_eval --hf=nanochat-d32 --tasks=lambada_openai --out=lambada.json
  python -m nanojax.evaluate.lm_eval --run=runs/d20 --tasks=my_task --include=my_tasks/     own task files, offline
The harness downloads the data of its own tasks from the Hugging Face hub.
"""


class NanojaxLM(LM):
    """The harness's interface to a model: log-likelihoods, rolling log-likelihoods, greedy or sampled text."""

    def __init__(self, config: Config, params: Any, tokenizer: Tokenizer, batch_tokens: int | None = None):
        super().__init__()
        self.config, self.params, self.tok = config, devices.on_each(params)[0], tokenizer
        self.score = likelihood.scorer(config, params, batch_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log p, whether greedy) of each (context, continuation)."""
        pairs = [self._encode_pair(*r.args) for r in requests]
        return self._score_pairs(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log p of each whole text, in windows of the model's sequence that begin with the begin token."""
        T = self.config.model.T
        windows = []  # (context, continuation)
        owner = []  # the request of each window
        for i, r in enumerate(requests):
            ids = self.tok.encode(r.args[0])
            for start in range(0, len(ids), T):
                windows.append(((self.tok.bos,), tuple(ids[start : start + T])))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owner, self._score_pairs(windows)):
            totals[i] += log_p
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to (without) the first of the request's `until` strings."""
        asked: collections.Counter[str] = collections.Counter()
        texts = []
        for r in requests:
            context, options = r.args
            texts.append(self._generate(context, options, seed=asked[context]))  # repeats are other samples
            asked[context] += 1
        return texts

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return self.tok.fingerprint[:16]

    def _encode_pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens of both; white space at the end of the context moves to the continuation, as in the harness's models."""
        space = context[len(context.rstrip()) :]
        continuation = space + continuation
        context = context.rstrip()
        whole = self.tok.encode(context + continuation)
        head = self.tok.encode(context)
        room = self.config.model.T
        tail = tuple(whole[len(head) :])[-room:]
        return (self.tok.bos, *head[max(0, len(head) - (room - len(tail))) :]), tail

    def _score_pairs(self, pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[tuple[float, bool]]:
        pairs = list(pairs)
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for context, continuation in pairs:
            groups.setdefault(context, []).append(continuation)
        requests = [Request(context, tuple(dict.fromkeys(found))) for context, found in groups.items()]
        answers = {
            (request.context, branch): answer
            for request, found in zip(requests, self.score(requests))
            for branch, answer in zip(request.branches, found)
        }
        chosen = [answers[pair] for pair in pairs]
        return [(-float(a.nll.astype("f8").sum()), bool(a.hits.all())) for a in chosen]

    def _generate(self, context: str, options: dict[str, Any], seed: int = 0) -> str:
        until = options.get("until") or []
        until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        sampled = bool(options.get("do_sample")) and float(options.get("temperature") or 0) > 0
        T = self.config.model.T
        room = min(int(options.get("max_gen_toks") or 256), T // 2)
        ids = [self.tok.bos, *self.tok.encode(context)[-(T - room - 1) :]]
        drawn = sample.stream(
            self.config,
            self.params,
            ids,
            room,
            temperature=float(options["temperature"]) if sampled else 0.0,
            seed=seed,
            end=self.tok.bos,
            vocab=self.tok.vocab_size,
        )
        new: list[int] = []
        text = ""
        for column in drawn:
            new.append(int(column[0]))
            text = self.tok.decode(new)
            if any(stop in text for stop in until):
                break
        for stop in until:
            text = text.split(stop)[0]
        return text


def main() -> None:
    """The command."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    parser = cli.Parser(
        "python -m nanojax.evaluate.lm_eval", "Runs tasks of lm-evaluation-harness on a model.", EXAMPLES
    )
    subject.add_arguments(parser)
    parser.add_argument("--tasks", required=True, help="task names, joined by commas")
    parser.add_argument("--include", type=cli.path, help="folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="examples of each task, the first N; default: all")
    parser.add_argument("--shots", type=int, help="few-shot examples; default: as the task says")
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens that go through the model together on a device (8192, on a CPU 2048)"
    )
    parser.add_argument("--out", type=cli.path, help="file for the results as JSON")
    a = parser.parse_args()
    if a.out:
        cli.output_folder(Path(a.out).parent)
    xla.configure()
    manager = TaskManager(include_path=a.include)
    names = a.tasks.split(",")
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: the harness knows no {', '.join(unknown)}; add your own with --include=FOLDER")
    found = subject.load(a.run, a.hf, a.dtype, a.step, number=a.devices)
    adapter = NanojaxLM(found.config, found.params, found.tokenizer, a.batch_tokens)
    outcome = simple_evaluate(model=adapter, tasks=names, task_manager=manager, limit=a.limit, num_fewshot=a.shots)
    results = {task: {k: v for k, v in r.items() if k != "alias"} for task, r in (outcome or {})["results"].items()}
    print(json.dumps(results, indent=1, default=str))
    if a.out:
        with files.write_atomic(a.out) as file:
            file.write((json.dumps(results, indent=1, default=str) + "\n").encode())


if __name__ == "__main__":
    run_main(main)
