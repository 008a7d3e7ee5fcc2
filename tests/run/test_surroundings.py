"""What goes wrong around a run: output, records, events, saves, data, evaluation. The run goes on, or stops saved."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import tensorboard as events
from helpers import tiny_run
from helpers.paths import ROOT
from rich.console import Console

from nanojax import cli, train
from nanojax import config as configs
from nanojax.cli import UserError
from nanojax.data import loader
from nanojax.run import checkpoint, exits, guard, metrics, output, records, run_folder, saving, watch
from nanojax.run.tensorboard import Board
from nanojax.tokenizer import Tokenizer

compile_cache = tiny_run.compile_cache
home = tiny_run.home
pytestmark = pytest.mark.usefixtures("compile_cache")


@pytest.fixture
def small_files() -> Iterator[Callable[[int | None], None]]:
    """small_files(n): no file of this process may grow beyond n bytes; None: as before."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))

    yield limit
    limit(None)


# -- output ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["nobody reads", "the reader pauses", "ascii"])
def test_output_neither_raises_nor_blocks(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 lines take no longer than lines into a queue; what is lost is counted, what fits no encoding is replaced."""
    monkeypatch.setattr(output, "LAST_SECONDS", 0.2)
    read, write = os.pipe()
    stream = os.fdopen(write, "w", encoding="ascii")
    if trouble == "nobody reads":
        os.close(read)
    out = output.Output(stream)
    begin = time.monotonic()
    for _ in range(1 if trouble == "ascii" else 20_000):
        out.write("loss 1.0 · ünïté\n")
    assert time.monotonic() - begin < 2
    out.drain(1)
    if trouble == "ascii":
        assert os.read(read, 100) == b"loss 1.0 ? ?n?t?\n" and out.lost == 0
    else:
        assert out.lost > 0 and out.reason in ("Broken pipe", "the reader is too slow")
    if trouble != "nobody reads":
        os.close(read)  # lets the thread end


def test_lost_output_is_counted(
    tiny: Callable[..., configs.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose stdout is gone has one warning and the number of lost writes in its records."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr("sys.stdout", output.Output(os.fdopen(write, "w")))
    log = metrics.Metrics(tiny(), tmp_path, 0)
    for step in range(1, 4):
        log.say("hello")
        time.sleep(0.1)
        log.train(step, {"loss": 1.0})
    log.close()
    assert [r["about"] for r in records.read(tmp_path, "warning")] == ["output"]
    assert records.read(tmp_path, "train")[-1]["warnings"]["output"] >= 2


@pytest.mark.parametrize("closing", ["1>&-", "2>&-", "0<&- 1>&- 2>&-", "1>/dev/full"])
def test_closed_streams(closing: str) -> None:
    """A command started without stdin, stdout or stderr, or with a full one, ends with a code and no traceback."""
    code = "from nanojax import cli\ncli.run_main(lambda: print('ü' * 99999))"
    command = f'{sys.executable} -c "{code}" {closing}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == (2 if "full" in closing else 0) and "Traceback" not in done.stderr, done.stderr


def test_characters_that_the_output_lacks() -> None:
    """Every command replaces them, lone surrogates included."""
    code = "from nanojax import cli\ncli.run_main(lambda: print('caf\\u00e9 \\udce9 日'))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    assert (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout == b"caf? ? ?\n"
    )


# -- records and events ------------------------------------------------------------------------------------------------


def test_records_wait_for_room(
    tmp_path: Path, small_files: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a line: no half line is left, and with room all records are there in order."""
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    file = records.Appender(tmp_path)
    small_files(1000)
    failed = [file.write({"kind": "train", "step": step, "text": "x" * 50}) for step in range(30)]
    assert failed[0] is None and failed[-1] is not None
    assert all(line.endswith("}") for line in (tmp_path / records.FILE).read_text().splitlines())
    small_files(None)
    assert file.write({"kind": "train", "step": 30}) is None
    file.close()
    assert [r["step"] for r in records.read(tmp_path)] == list(range(31))


def test_waiting_records_are_bounded(
    tmp_path: Path, small_files: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most KEPT wait; the oldest go first, and are counted."""
    monkeypatch.setattr(records, "KEPT", 10)
    monkeypatch.setattr(records, "RETRY_SECONDS", 0.0)
    file = records.Appender(tmp_path)
    small_files(0)
    for step in range(25):
        file.write({"kind": "train", "step": step})
    assert file.dropped == 15 and len(file.waiting) == 10
    small_files(None)
    file.close()
    assert [r["step"] for r in records.read(tmp_path)] == list(range(15, 25))


def test_damaged_records_cost_their_line(tmp_path: Path) -> None:
    """Bytes that are no text, JSON of another kind and a cut line between good records are left out, the rest is read."""
    good = [json.dumps({"kind": "train", "step": s}).encode() for s in range(4)]
    bad = [b"\xff\xfe\x00", b"null", b"[1]", b'{"step": "a", "kind": "train"}', b"[" * 9999, b'{"kind": "tr']
    (tmp_path / records.FILE).write_bytes(b"\n".join([good[0], *bad[:3], good[1], good[2], *bad[3:5], good[3], bad[5]]))
    assert [r["step"] for r in records.read(tmp_path)] == [0, 1, 2, 3]


def test_events_survive_a_full_disk(tmp_path: Path, small_files: Callable[[int | None], None]) -> None:
    """Events that do not fit are lost and said to be; those before and after are whole."""
    board = Board(tmp_path)
    small_files(300)
    failed = [board.scalar("loss", 1.0, step) for step in range(20)]
    assert failed[0] is None and failed[-1] is not None
    small_files(None)
    assert board.scalar("loss", 1.0, 99) is None
    board.close()
    steps = [e.step for e in events.events(tmp_path) if e.summary.value]
    assert steps == [*(step for step, why in enumerate(failed) if why is None), 99]


# -- saving ------------------------------------------------------------------------------------------------------------


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.long
def test_a_save_leaves_no_thread(home: Path, tmp_path: Path) -> None:
    """A run of weeks with many checkpoints must not collect them: orbax keeps one for each response that nobody asks."""
    (tmp_path / "run").mkdir()
    config = tiny_run.load(home / "tiny.py", tmp_path / "run")
    log = metrics.Metrics(config, tmp_path / "run", 0, Console(file=io.StringIO()))
    saver = saving.Saver(tmp_path / "run", config, Tokenizer.load(home / "data" / "tokenizer"), log)
    state = jax.jit(train.steps.init_state, static_argnums=0)(config)
    at = lambda step: state._replace(step=state.step * 0 + step)
    saver.finish(at(1), {}, patience=0)
    before = threading.active_count()
    for step in (2, 3, 4):
        saver.save(at(step), {})
    saver.finish(at(5), {}, patience=0)
    assert threading.active_count() <= before
    saver.close()


def test_failed_save(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A save that fails behind the loop's back is told with its own step, tried again RETRY_SECONDS later; the old stays."""
    config = tiny_run.load(home / "tiny.py", tmp_path / "run")
    state = jax.jit(train.steps.init_state, static_argnums=0)(config)
    at = lambda step: state._replace(step=state.step * 0 + step)
    (tmp_path / "run").mkdir()
    log = metrics.Metrics(config, tmp_path / "run", 0, Console(file=io.StringIO()))
    saver = saving.Saver(tmp_path / "run", config, Tokenizer.load(home / "data" / "tokenizer"), log)
    assert saver.finish(at(1), {}, patience=0)
    clock, wait = _Clock(), checkpoint.wait

    def full(writer: object, step: int, response: object) -> None:
        wait(writer, step, response)  # pyright: ignore[reportArgumentType]
        (tmp_path / "run" / "checkpoints" / str(step)).rename(tmp_path / "gone")
        raise UserError(f"saving step {step} failed: no space")

    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(checkpoint, "wait", full)
    saver.save(at(2), {})
    while saver.writing:
        saver.notice()
    said = capsys.readouterr().err
    assert "saving step 2 failed: no space; the checkpoint of step 1 stays" in said
    assert run_folder.available(tmp_path / "run") == [1] and not saver.retry_is_due
    clock.now += saving.RETRY_SECONDS
    assert saver.retry_is_due
    monkeypatch.setattr(checkpoint, "wait", wait)
    assert saver.finish(at(3), {}, patience=0)
    assert run_folder.available(tmp_path / "run") == [1, 3] and not saver.retry_is_due
    saver.close()
    log.close()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the save that was under way
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_run_folder_that_is_gone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """After step 5 the folder is moved or removed: from the next save on it is a whole run folder again, with every record."""
    run, batch = tmp_path / "run", guard.next_batch

    def away(batches: loader.TrainIterator, *rest: object) -> object:
        if batches.position == 5 * batches.rows:
            run.rename(tmp_path / "elsewhere")
            if how == "removed":
                shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
        return batch(batches, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(guard, "next_batch", away)
    config = tiny_run.load(home / "tiny.py", run, eval__every=0)
    assert train.train(config) == exits.DONE
    assert [r["step"] for r in metrics.read(run, "train")] == list(range(1, 13))
    assert "run folder" in {r["about"] for r in metrics.read(run, "warning")}
    assert run_folder.read_config(run) == config and checkpoint.load(run).step == 12
    assert train.train(config) == exits.DONE


def test_exit_codes_are_documented() -> None:
    """The table of docs/running.md has every code; loop and unit do not restart exactly those that it says."""
    text = (ROOT / "docs" / "running.md").read_text()
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.M)}
    codes = {value for name, value in vars(exits).items() if name.isupper() and isinstance(value, int)}
    assert table == codes
    again = {int(code) for code in re.findall(r"^\| (\d+) \|.*\| yes \|$", text, re.M)}
    for stop in (
        re.findall(r"in ([\d| ]+)\) break", text)[0].split("|"),
        re.findall(r"PreventExitStatus=(.*)", text)[0].split(),
    ):
        assert {int(code) for code in stop} == codes - again


@pytest.mark.parametrize("begun", [False, True])
def test_trouble_at_the_start(begun: bool) -> None:
    """Missing data are a mistake the first time; a run that has trained before ends with a code to be restarted."""
    with pytest.raises(exits.Failed if begun else UserError, match="no data folder") as failed, exits.restarting(begun):
        raise UserError("no data folder")
    assert not begun or failed.value.code == exits.FAILED  # pyright: ignore[reportAttributeAccessIssue]


# -- the loop ----------------------------------------------------------------------------------------------------------


def _raise(error: BaseException, *_: object) -> None:
    raise error


@pytest.mark.long
def test_a_failed_evaluation(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation fails: the run is done and saved, with one warning, and each step was saved before its evaluation.

    The same command then evaluates what is missing, and nothing else.
    """
    saved: list[list[int]] = []
    evaluate = train._evaluate

    def failing(*_: object) -> None:
        saved.append(run_folder.available(tmp_path / "run"))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(train, "_evaluate", failing)
    monkeypatch.setattr(saving.Saver, "save", _and_wait(saving.Saver.save))
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", eval__every=6)
    assert train.train(config) == exits.DONE
    assert [steps[-1] for steps in saved] == [6, 12]
    assert [r["about"] for r in metrics.read(tmp_path / "run", "warning")] == ["evaluation"]
    assert metrics.read(tmp_path / "run", "end")[-1]["warnings"] == {"evaluation": 2}
    monkeypatch.setattr(train, "_evaluate", evaluate)
    assert train.train(config) == exits.DONE
    assert [r["step"] for r in metrics.read(tmp_path / "run", "eval")] == [12]


@pytest.mark.long
@pytest.mark.parametrize("at", [6, 12])
def test_a_signal_cuts_an_evaluation_short(
    at: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before it is saved, nothing else is trained, and the same command makes the evaluation first; at the end, too."""
    alive = guard.alive

    def signalled(watched: watch.Watch, stop: threading.Event) -> None:
        if watched.step == at:
            stop.set()
        alive(watched, stop)

    monkeypatch.setattr(guard, "alive", signalled)
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", eval__every=6)
    assert train.train(config) == exits.STOPPED
    assert run_folder.available(tmp_path / "run")[-1] == at
    assert at not in [r["step"] for r in metrics.read(tmp_path / "run", "eval")]
    monkeypatch.setattr(guard, "alive", alive)
    assert train.train(config) == exits.DONE
    assert [r["step"] for r in metrics.read(tmp_path / "run", "eval")] == [6, 12]


def _and_wait(save: Callable[..., None]) -> Callable[..., None]:
    def waiting(self: saving.Saver, *arguments: object) -> None:
        save(self, *arguments)
        if self.writing is not None:
            self._settle()

    return waiting


@pytest.mark.long
@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["next_batch", "_read"])
def test_an_exception_in_the_loop(
    where: str, error: BaseException, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is, the finished steps are saved on the way out, and the resumed run is the undisturbed one."""
    module = guard if where == "next_batch" else train
    whole = getattr(module, where)
    calls = iter(range(99))
    monkeypatch.setattr(module, where, lambda *a: _raise(error) if next(calls) == 6 else whole(*a))
    config = tiny_run.load(home / "tiny.py", tmp_path / "run", checkpoint__every=0)
    with pytest.raises(exits.Failed, match=r"saved after step [678]; the same command resumes") as failed:
        train.train(config)
    assert failed.value.code == (exits.STOPPED if isinstance(error, KeyboardInterrupt) else exits.FAILED)
    monkeypatch.setattr(module, where, whole)
    assert train.train(config) == exits.DONE
    reference = tiny_run.load(home / "tiny.py", home / "exception_reference", checkpoint__every=0)
    train.train(reference)
    tiny_run.assert_same_run(home / "exception_reference", tmp_path / "run")


def test_data_that_comes_back(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a shard is gone the loop waits; the batches that follow are those of an undisturbed reader."""
    monkeypatch.setattr(guard, "FIRST_WAIT", 0.01)
    make = lambda: loader.train_iterator(home / "data", 40, 32, 0, 320)
    reference, batches = make(), make()
    log, stop = _Log(), threading.Event()
    guarded = watch.Watch(home, 0)
    shard, away = home / "data" / "train_00000.bin", home / "data" / "away"
    shard.rename(away)
    back = threading.Timer(0.5, lambda: away.rename(shard))
    back.start()
    for _ in range(100):  # several passes over the shard
        batch = guard.next_batch(batches, log, guarded, stop)  # pyright: ignore[reportArgumentType]
        assert batch is not None and (batch == next(reference)).all()
    back.join()
    assert "data" in log.kinds
    assert batches.get_state() == reference.get_state()


class _Log:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def warn(self, about: str, _: str) -> None:
        self.kinds.append(about)


def test_data_that_stays_away(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After PATIENCE seconds: DataGone, with the reason; a signal ends the waiting at once."""
    monkeypatch.setattr(guard, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    batches, stop = _Gone(), threading.Event()
    with pytest.raises(guard.DataGone, match=r"train_00000.bin: gone; tried again for"):
        guard.next_batch(batches, _Log(), watch.Watch(home, 0), stop)  # pyright: ignore[reportArgumentType]
    stop.set()
    assert guard.next_batch(batches, _Log(), watch.Watch(home, 0), stop) is None  # pyright: ignore[reportArgumentType]


class _Gone:
    def __next__(self) -> np.ndarray:
        raise UserError("train_00000.bin: gone")

    reopen = __next__


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_watch(tmp_path: Path) -> None:
    """A loop that hangs for the time allowed ends with 7; stalled.txt has the step, the GPU and every thread's stack."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom nanojax.run import watch\nwatch.TICK = 0.01\n"
        "def a_step_that_hangs(): time.sleep(60)\n"
        "with watch.standing(Path(sys.argv[1]), 0.02) as guard:\n guard.beat(41)\n a_step_that_hangs()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == exits.STALLED, done.stderr
    report = (tmp_path / watch.REPORT).read_text()
    assert "after step 41" in report and "a_step_that_hangs" in report and "GPU" in report
    assert len(done.stderr.splitlines()) == 1 and "stalled.txt" in done.stderr


def test_a_hang_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the loop begins STARTING_MINUTES are allowed, however few minutes a step may take."""
    reported = threading.Event()
    monkeypatch.setattr(watch, "TICK", 0.01)
    monkeypatch.setattr(watch, "report", lambda *_: reported.set())
    monkeypatch.setattr(watch.os, "_exit", lambda _: None)
    with watch.standing(tmp_path, 0.001):
        assert not reported.wait(0.5)
    monkeypatch.setattr(watch, "STARTING_MINUTES", 0.001)
    with watch.standing(tmp_path, 0.001):
        assert reported.wait(5)


@pytest.mark.long
def test_the_watch_waits_for_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats keep it quiet for many times its limit, 0 minutes turn it off."""
    monkeypatch.setattr(watch, "TICK", 0.01)
    monkeypatch.setattr(watch, "report", lambda *_: pytest.fail("reported"))
    for minutes in (0.01, 0.0):
        with watch.standing(tmp_path, minutes) as guarded:
            for _ in range(10):
                time.sleep(0.2)
                guarded.beat() if minutes else None


@pytest.mark.long
@pytest.mark.parametrize("signals", [[signal.SIGHUP], [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM]])
def test_signals(signals: list[signal.Signals], home: Path, tmp_path: Path, compile_cache: Path) -> None:
    """A closed terminal, and a supervisor that sends several signals: exit 3, the last step is saved."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("these tests were started with nohup, so that a closed terminal ends nothing")
    run = tmp_path / "run"
    process = tiny_run.spawn(home / "tiny.py", run, compile_cache, train__steps=100000)
    tiny_run.wait_for(process, lambda: metrics.read(run, "train"))
    for number in signals:
        process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == exits.STOPPED, said
    assert run_folder.available(run)[-1] == metrics.read(run, "train")[-1]["step"]
    assert metrics.read(run, "end")[-1]["code"] == exits.STOPPED


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, small_files: Callable[[int | None], None]
) -> None:
    """Any command that meets one says so in a line and exits with 2."""

    def command() -> None:
        small_files(10)
        (tmp_path / "file").write_text("x" * 100)

    with pytest.raises(SystemExit) as stop:
        cli.run_main(command)
    small_files(None)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: the output: cannot be written (File too large); free space, then run it again\n"
    )
