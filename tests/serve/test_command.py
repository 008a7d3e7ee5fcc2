"""The command: its mistakes, a start before the model is loaded, and how it stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from helpers.paths import ROOT
from helpers.serving import TOKENIZER, random_model

from nanojax import step
from nanojax.cli import run_main
from nanojax.run import checkpoint, run_folder
from nanojax.serve import __main__ as command
from nanojax.serve.app import Service, make
from nanojax.serve.metrics import Metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of random parameters."""
    (config, params), folder = random_model(seq=1024), tmp_path_factory.mktemp("serve") / "run"
    TOKENIZER.save(folder / "tokenizer")
    run_folder.write_config(folder, config)
    state = jax.jit(step.init_state, static_argnums=0)(config)._replace(params=params)
    writer = checkpoint.open_for_saving(folder, config)
    checkpoint.save(writer, config, state, {}, TOKENIZER.fingerprint)
    writer.close()
    return folder


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "--run"), (["--run=/nowhere"], "/nowhere: "), (["--port=70000"], "--port=70000"), (["--rows=0"], "--rows=0"),
        (["--context=1"], "--context=1"), (["--timeout=nan"], "--timeout=nan"), (["--host=0.0.0.0"], "--api-key-file"),
        (["--host=192.168.0.1"], "--api-key-file"), (["--api-key-file=KEY"], "at least 8 characters"),
        (["--api-key-file=/nowhere"], "No such file"), (["--host=no.such.host.invalid", "--without-key"], "cannot listen"),
        (["--port=TAKEN"], "cannot listen there"), (["--cache=int3"], "--cache"), (["--nonsense=1"], "--nonsense"),
    ],
)  # fmt: skip
def test_mistakes(
    wrong: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each is one line and exit 2, before anything is loaded: the port, the key, the host, the run."""
    (tmp_path / "KEY").write_text("short")
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = [w.replace("TAKEN", port).replace("KEY", str(tmp_path / "KEY")) for w in wrong]
        asked = wrong if not wrong or wrong[0].startswith("--run") else [f"--run={tmp_path}", *wrong]
        monkeypatch.setattr("sys.argv", ["serve", *asked])
        with pytest.raises(SystemExit) as stop:
            run_main(command.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ") and said in err


@pytest.mark.long
def test_a_model_that_was_not_trained_to_chat(run: Path) -> None:
    """It is refused unless --base is given; a damaged run is told as elsewhere. Both stop the server that has begun."""
    for folder, base, said in ((run, False, "--base"), (run.parent, True, "not a run folder")):
        service = Service("tiny", Metrics())
        server = command.Server(make(service), service, 1)
        server.load(
            SimpleNamespace(run=str(folder), dtype=None, step=None, base=base, context=None, rows=1, cache="float")
        )
        assert server.should_exit and said in str(server.mistake) and service.state == "loading"


def test_no_signal_is_lost_before_uvicorn_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes right after the address was printed stops the server, which then need not have begun to listen."""
    service, seen = Service("tiny", Metrics()), []
    server = command.Server(make(service), service, 1)

    def begins(self: command.Server, sockets: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        seen.append(self.should_exit)

    monkeypatch.setattr(command.Server, "run", begins)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            assert server.serve_until_stopped(listening) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [True] and service.closing


@pytest.fixture
def start(run: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts the command on a free port: (process, address), as soon as it listens."""
    started = []

    def spawn(*options: str) -> tuple[subprocess.Popen[str], str]:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        line = [sys.executable, "-m", "nanojax.serve", f"--run={run}", "--port=0", "--base", "--rows=1", *options]
        process = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process, (process.stderr.readline() if process.stderr else "").split()[0]

    yield spawn
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.long
def test_start_and_stop(start: Callable[..., tuple[subprocess.Popen[str], str]]) -> None:
    """It listens before the model is loaded and says so with 503; a stream that does not end within the grace is cut on
    SIGTERM, is told so, and the exit code is 3; the log has no request."""
    process, url = start("--grace=0", "--tokens=1024")
    with pytest.raises(urllib.error.HTTPError) as loading:
        urllib.request.urlopen(url + "/health")
    assert loading.value.code == 503 and json.load(loading.value) == {"status": "loading"}
    loading.value.close()
    assert process.stderr and process.stderr.readline().startswith("ready: run, rows of 1024 tokens: 1")
    body = json.dumps({"prompt": "my secret", "max_tokens": 1000, "stream": True}).encode()
    request = urllib.request.Request(url + "/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as stream:
        assert stream.readline().startswith(b"data: {")
        process.send_signal(signal.SIGTERM)
        text = stream.read()
    assert b"[DONE]" not in text and b"the server is stopping" in text
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 3 and "secret" not in err and "Traceback" not in err, err


@pytest.mark.slow
def test_stops_when_answers_have_ended(start: Callable[..., tuple[subprocess.Popen[str], str]]) -> None:
    """Within the grace an answer is finished, and the exit code is 0; so it is without any, and while it loads."""
    process, url = start()
    assert process.stderr and process.stderr.readline().startswith("ready")
    asked = {"prompt": "a", "max_tokens": 300, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        assert reply.readline().startswith(b"data: ")  # it is being written
        process.send_signal(signal.SIGINT)
        events = [line for line in reply if line.startswith(b"data: {")]
    assert json.loads(events[-1][6:])["usage"]["completion_tokens"] == 300
    assert process.wait(30) == 0
    for seconds in (0, 0.3, 0.7, 1.5):  # while it reads the checkpoint, while it compiles
        process, _ = start()
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
