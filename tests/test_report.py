"""nanojax.report: what its page says of whole, partial, damaged and fine-tuned runs; its HTML and its Markdown."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanojax.cli import UserError
from nanojax.config import Config
from nanojax.report import __main__ as report
from nanojax.report import as_html, as_markdown, curves, page, read, scores, text
from nanojax.report.blocks import Chart, Page, Sample, Section
from nanojax.run import records, run_folder

Make = Callable[..., Config]
NOON = 1_800_000_000.0
EVIL = "</pre><script>alert(1)</script>|`**\x00\x1b[31m‮\ud800 & <b onclick='x'>"
VOID = {"meta", "br"}


class Checked(HTMLParser):
    """Fails on a tag that is closed out of order or not at all; keeps the text, the tags, and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(html: str) -> Checked:
    """The page as a browser reads it."""
    found = Checked()
    found.feed(html)
    found.close()
    assert found.open == [] and "script" not in found.tags
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "srcset", "data"} and not any(name.startswith("on") for name in names)
    assert not re.search(r"https?:|url\(|@import|//", html)
    return found


def write(run: Path, config: Config, *entries: dict, **evals: dict) -> Path:
    """A run folder with these records, a second apart, and these evaluations."""
    run.mkdir(parents=True)
    run_folder.write_config(run, config)
    lines = [json.dumps({"time": NOON + i, **entry}) for i, entry in enumerate(entries)]
    (run / records.FILE).write_text("\n".join(lines) + "\n")
    (run / "evals").mkdir()
    for name, content in evals.items():
        (run / "evals" / f"{name}.json").write_text(json.dumps(content))
    return run


START = {
    "kind": "start",
    "step": 0,
    "device": "NVIDIA GeForce RTX 4070",
    "jax": "0.12.0",
    "command": "python -m x --a=1",
}
TRAINED = [
    {"kind": "train", "step": i, "tokens": 128 * i, "loss": 5 / i, "lr": 1.0, "tokens_per_s": 64.0, "kwh": i / 8}
    for i in range(1, 21)
]
EVALUATED = {"kind": "eval", "step": 20, "bpb": 1.2345, "nll": 2.5}
SAMPLED = {"kind": "sample", "step": 20, "text": "Fellow citizens, peace"}
CHAT = {
    "step": 20,
    "means": {"ChatCORE": {"value": 0.125, "low": 0.1, "high": 0.15}},
    "tasks": {
        "spelling": {
            "n": 256, "right": 224, "accuracy": 0.875, "low": 0.829, "high": 0.9101, "baseline": 0.0,
            "samples": [{"prompt": "Spell peace", "answer": "peace:p,e,a,c,e", "right": True}],
        },
        "gsm8k": {"n": 1319, "right": 60, "accuracy": 0.0455, "low": 0.0355, "high": 0.0581, "baseline": 0.0},
    },
}  # fmt: skip


def whole(tiny: Make, run: Path, **keys: dict) -> Path:
    """A run that is done, with every kind of record and evaluation."""
    config = tiny(train={"steps": 20, **keys.pop("train", {})}, **keys)
    bpb = {"step": 20, "bpb": 1.1111, "nll": 2.0, "tokens": 4096, "input": "data/x", "command": "python -m bpb"}
    core = {"step": 20, "core": 0.2718, "tasks": {}, "max_per_task": 0}
    write(run, config, START, *TRAINED, EVALUATED, SAMPLED, bpb_000020=bpb, core_000020=core, chat_000020=CHAT)
    (run / "checkpoints" / "20").mkdir(parents=True)
    data = {
        "path": "data/x", "kind": "text", "tokenizer": {"ids": 1024, "inputs": ["sotu"], "command": "python -m tok"},
        "command": "python -m prep", "totals": {"train": {"tokens": 1010, "documents": 10, "bytes": 3000}},
    }  # fmt: skip
    (run / "data.json").write_text(json.dumps(data))
    return run


def both(run: Path) -> tuple[str, str]:
    """(the HTML's text, the Markdown) of a run's report."""
    found = page.page(*read.stages(run), NOON)
    return parsed(as_html.document(found)).text, as_markdown.markdown(found)


def test_a_whole_run(tiny: Make, tmp_path: Path) -> None:
    """Each figure is that of the records and evaluations: scores, tokens, time, energy, money, data, commands, texts."""
    html, markdown = both(whole(tiny, tmp_path / "run"))
    flops = tiny().model.flops_per_token * 2560
    said = [
        "20 of 20", "2.56k", f"{flops:.2e}", "1.2345", "0.2718", "0.1250 (0.1000 to 0.1500)", "00:00:22", "2.50", "8.75",
        "1.1111", "0.8750 (0.8290 to 0.9101)", "256", "0.0455", "NVIDIA GeForce RTX 4070", "0.12.0", "3.000 bytes per token",
        "Fellow citizens, peace", "Spell peace", "peace:p,e,a,c,e   [right]", "0.3168", "GPT-2 1.5B", "sotu",
    ]  # fmt: skip
    assert [each for each in said if each not in html or each not in markdown.replace("\\", "")] == []
    commands = ["python -m tok", "python -m prep", "python -m x --a=1", "python -m bpb"]
    assert "\n".join(commands) in html and "\n".join(commands) in markdown
    rows = [line for line in markdown.splitlines() if line.startswith(("| nanochat d32", "| run", "| GPT"))]
    assert [row.split("|")[1].split()[0] for row in rows if "0." in row][:3] == ["nanochat", "run", "GPT-2"]


def test_all_problems_count_before_the_first_few(tiny: Make, tmp_path: Path) -> None:
    """At one step, ChatCORE of all problems stands, whatever the files are called; at a later step, the newest."""
    few = {**CHAT, "max_per_task": 100, "means": {"ChatCORE": {"value": 0.9}}}
    run = write(tmp_path / "run", tiny(), START, chat_000020=CHAT, chat_000020_max100=few)
    assert scores.means_of(read.stage(run)) == {"ChatCORE": "0.1250 (0.1000 to 0.1500)"}
    (run / "evals" / "chat_000030_max100.json").write_text(json.dumps({**few, "step": 30}))
    assert scores.means_of(read.stage(run)) == {"ChatCORE": "0.9000"}


def test_curves_show_every_value(tiny: Make, tmp_path: Path) -> None:
    """A chart per quantity that the records have, with a point per record; of long ones the range stays."""
    document = as_html.document(page.page(*read.stages(whole(tiny, tmp_path / "run")), NOON))
    assert document.count("<svg ") == 3  # loss, rate, tokens/s: one validation is no curve
    (line,) = re.findall(
        r'<polyline class="mean s0" points="([^"]*)"', document.split('aria-label="loss')[1].split("</svg>")[0]
    )
    assert len(line.split()) == 20
    spike = [(float(i), 9.0 if i == 5000 else 1.0) for i in range(10_000)]
    drawn = curves.svg(Chart("x", {"a": spike}))
    ys = [float(y) for y in re.findall(r",([\d.]+)", re.findall(r'range s0" points="([^"]*)"', drawn)[0])]
    assert min(ys) < 40 and len(drawn) < 20_000
    assert [b.high for b in text.thinned(spike, 100)].count(9.0) == 1


def test_a_fine_tuned_run_has_both_stages(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of base and tuned run and of both together; found where it was, or beside the run after both were copied."""
    base = whole(tiny, tmp_path / "a" / "base")
    tuned = whole(tiny, tmp_path / "a" / "tuned", train={"init": str(base)}, data={"kind": "conversations"})
    found, absent = read.stages(tuned)
    assert [stage.name for stage in found] == ["base", "tuned"] and not absent
    html, markdown = both(tuned)
    assert "fine-tuned from base" in html and "5.12k" in html and "base: pretraining" in html
    assert "| tokens | 2.56k | 2.56k | 5.12k |" in markdown and "| energy, kWh | 2.50 | 2.50 | 5.00 |" in markdown
    assert "base: peace:p,e,a,c,e   [right]\n\ntuned: peace" in html
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(read.stages(tmp_path / "b" / "tuned")[0]) == 2
    monkeypatch.chdir(tmp_path / "b" / "tuned")
    assert len(read.stages(Path("."))[0]) == 2
    (tmp_path / "b" / "base").rename(tmp_path / "elsewhere")
    html, _ = both(tmp_path / "b" / "tuned")
    assert f"{base}, whose folder is not there" in html


def test_a_run_that_began_from_itself_ends(tiny: Make, tmp_path: Path) -> None:
    """Two runs that name each other, as copied folders may: each is read once."""
    for name, other in (("a", "b"), ("b", "a")):
        whole(tiny, tmp_path / name, train={"init": str(tmp_path / other)})
    assert [stage.name for stage in read.stages(tmp_path / "a")[0]] == ["b", "a"]


def test_a_partial_run(tiny: Make, tmp_path: Path) -> None:
    """What is not there is said: scores, texts, energy, data, commands; a run that was killed before its first record, too."""
    run = write(tmp_path / "run", tiny(), {"kind": "start", "step": 0}, {"kind": "train", "step": 1, "loss": 2.0})
    (run / "evals").rmdir()
    with open(run / records.FILE, "a") as file:  # as runs wrote it before momenta could be taken over
        file.write('{"kind": "init", "step": 0, "from": "runs/base", "from_step": 6}\n')
    assert "| began from | runs/base, step 6 |" in both(run)[1].replace("\\", "")
    begun = tmp_path / "begun"
    run_folder.write_config(begun, tiny())
    for folder in (run, begun):
        html, markdown = both(folder)
        for said in (
            "Not measured",
            "No text of the model",
            "not measured (no NVIDIA driver)",
            "Not recorded",
            "No curve",
        ):
            assert said in html and said in markdown.replace("\\", "")


def test_a_damaged_run(tiny: Make, tmp_path: Path) -> None:
    """Lines that are no records are counted; values of other kinds, cut files and missing keys are left out."""
    odd = [
        {"kind": "train", "step": 2, "loss": "x", "lr": True, "tokens_per_s": float("nan"), "kwh": [], "time": {}},
        {"kind": "train", "step": 10**400, "loss": 1.0, "tokens": 10**400, "time": float("inf")},
        {"kind": "sample", "step": 2, "text": 7}, {"kind": ["list"], "step": 1}, {"kind": "core", "step": 2, "core": None},
        {"kind": "end", "step": 2, "code": []}, {"kind": "warning", "step": 2, "about": {}, "text": None},
        {"kind": "start", "step": 2, "device": 4, "command": 5}, {"kind": "init", "step": 0},
    ]  # fmt: skip
    evals = {
        "chat_1": {"tasks": [1], "means": 2}, "chat_2": {"tasks": {"a": 1, "b": {"n": "x"}, "c": {"n": 3, "samples": [1, {}]}}},
        "core_1": {"core": "high"}, "bpb_1": {"step": "x"}, "other": {},
    }  # fmt: skip
    run = write(tmp_path / "run", tiny(), *TRAINED, *odd, **evals)
    with open(run / records.FILE, "ab") as file:
        file.write(b'\xff\x00\n[]\n{"kind": "train", "st')
    (run / "evals" / "core_2.json").write_text('{"core": 0.')
    (run / "data.json").write_text('{"tokenizer": 3, "totals": [], "entries": [7, {}], "path": null}')
    html, _ = both(run)
    assert "4 damaged lines" in html and "core_2.json: unreadable" in html
    assert "chat_1.json: names no tasks" in html and "data.json: does not say what the data is" in html
    (run / "data.json").write_text("")
    (run / run_folder.CONFIG).write_text("{")
    html, _ = both(run)
    assert "whose config cannot be read" in html and "data.json: unreadable" in html


def test_text_of_others_is_only_text(tiny: Make, tmp_path: Path) -> None:
    """Markup in names, commands, samples and answers shows as characters; controls and half surrogates as U+FFFD."""
    outcome = {"n": 1, "accuracy": 1.0, "samples": [{"prompt": EVIL, "answer": EVIL, "right": True}]}
    chat = {"step": 1, "tasks": {EVIL: outcome}, "means": {EVIL: {"value": 1.0}}}
    start, sample = {**START, "command": EVIL, "device": EVIL}, {"kind": "sample", "step": 1, "text": f"````\n{EVIL}"}
    run = write(tmp_path / "<b>run|*", tiny(), start, sample, TRAINED[0], chat_1=chat)
    (run / "evals" / "sample_1.txt").write_bytes(b"<script>\xff")
    html, markdown = both(run)
    assert "</pre><script>alert(1)</script>|`**��[31m�� & <b onclick='x'>" in html and "<b>run|*" in html
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", markdown)
    assert not re.search(r"(?<!\\)[<]", outside)
    for table in re.findall(r"(?m)(?:^\|.*\n)+", outside):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert markdown.encode() and "`````text\n````\n" in markdown


def test_time_counts_no_stops(tiny: Make, tmp_path: Path) -> None:
    """From each start to the last record before the next; clocks that jump back give no negative time."""
    at = lambda seconds, kind="train": {"kind": kind, "step": 1, "time": NOON + seconds}
    times = [at(0, "start"), at(10), at(1000, "start"), at(1005), at(2000, "start"), at(1990), at(9999, "start")]
    assert read.stage(write(tmp_path / "run", tiny(), *times)).seconds == 15


def test_ticks_are_round() -> None:
    """They enclose the values, a handful of them, also of flat, tiny and huge ranges."""
    assert curves.ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert curves.ticks(2.0, 2.0, 5) == [2.0]
    for low, high in ((3.13, 6.93), (-1e-9, 1e-9), (1e15, 1e15 + 1), (0.0, 5e-324), (-1e299, 1e299), (1.0, 1 + 1e-15)):
        found = curves.ticks(low, high, 5)
        assert len(found) <= 8 and (found[0] <= low + 1e-9 * abs(low) or len(found) == 1)


def test_figures_are_short() -> None:
    """Four digits; large ones with commas or as a power of ten."""
    assert [text.figure(v) for v in (0.0, 1.23456, 71680, 4.54e20, 1e-5)] == [
        "0",
        "1.235",
        "71,680",
        "4.54e20",
        "1.00e-5",
    ]
    chart = Section(2, "", [Chart("a", {"b": [(1.0, 2.0)]}), Sample("c", "d")])
    assert "▁" in as_markdown.markdown(Page("t", [chart])) and "<circle" in as_html.document(Page("t", [chart]))


def test_command(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Writes both files into the run folder or --out; a missing folder, another's, an unwritable --out are one line each."""
    run = whole(tiny, tmp_path / "run")
    for out in ([], [f"--out={tmp_path / 'new' / 'place'}"]):
        monkeypatch.setattr("sys.argv", ["report", f"--run={run}", *out])
        report.main()
        folder = Path(out[0].removeprefix("--out=")) if out else run
        parsed((folder / "report.html").read_text())
        assert (folder / "report.md").read_text().startswith("# Report on run")
    assert "written:" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.tokens").touch()
    for wrong, says in (
        (f"--run={tmp_path / 'none'}", "no such folder"), (f"--run={tmp_path / 'other'}", "not a run folder"),
        (f"--run={tmp_path / 'empty'}", "nothing to report"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["report", wrong])
        with pytest.raises(UserError, match=says):
            report.main()
    monkeypatch.setattr("sys.argv", ["report", f"--run={run}", f"--out={run / 'config.json'}"])
    with pytest.raises(UserError, match="--out"):
        report.main()


def test_cores_interval_is_that_of_its_tasks(tiny: Make, tmp_path: Path) -> None:
    """10 of 10 above a baseline of 0.25, and 5 of 10: Wilson's bounds 0.7225 and 0.2366 to 0.7634, centred, by hand.

    A file without baselines, as written before they were kept, has no interval.
    """
    tasks = {"a": {"correct": 10, "total": 10, "baseline": 0.25}, "b": {"correct": 5, "total": 10, "baseline": 0.0}}
    run = write(tmp_path / "run", tiny(), *TRAINED, core_000020={"step": 20, "core": 0.75, "tasks": tasks})
    assert scores.core_of(read.stage(run)) == ("0.7500 (0.5229 to 0.8817)", "step 20, all examples")
    del tasks["a"]["baseline"]
    (run / "evals" / "core_000020.json").write_text(json.dumps({"step": 20, "core": 0.75, "tasks": tasks}))
    assert scores.core_of(read.stage(run)) == ("0.7500", "step 20, all examples")
