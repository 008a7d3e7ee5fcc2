"""What README, docs/ and the files say about the project, against the project: what is written is there, and the reverse."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from helpers.paths import ROOT

from nanojax import config as configs
from nanojax import config_files, config_rules, step

PACKAGE = ROOT / "nanojax"
SOURCES = sorted(p for folder in ("nanojax", "configs", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))
PAGES = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))) if p.exists()]
PLAN = re.compile(
    r"^plan \((?:\d+ x )?\w+(?:, \w+)?\): peak ([\d.]+) GiB, ([\d.]+)(k?) tok/s modelled, ([\d.]+) (days|hours)$", re.M
)
LONGEST = 60  # lines of a function, docstring and comments included
LONG_FOR_A_REASON = {"nanojax/train.py:train": "the run, readable top to bottom"}

page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def cells(text: str) -> Iterator[list[str]]:
    """The cells of every table row that begins with the name of a config."""
    for row, name in re.findall(r"^\| (`(\w+)`.*) \|$", text, re.M):
        if name in config_files.available():
            yield [cell.strip() for cell in row.split("|")]


def plan_line(name: str) -> tuple[float, float, float]:
    """(peak in GiB, tokens/s, days) that the docstring of a config gives."""
    found = PLAN.search(config_files.find(name).read_text())
    assert found, name
    peak, rate, thousand, length, unit = found.groups()
    return float(peak), float(rate) * (1000 if thousand else 1), float(length) / (24 if unit == "hours" else 1)


def agree(written: str, exact: float) -> bool:
    """Whether `written`, such as 8.1k or 53, is `exact` rounded to its decimals."""
    digits = re.sub(r"k?( GiB)?$", "", written)
    decimals = len(digits.partition(".")[2])
    return abs(float(digits) - exact / (1000 if "k" in written else 1)) <= 0.51 * 10**-decimals


def test_file_map() -> None:
    """README's file map names every room and file of nanojax/, and nothing that is not there."""
    text = (ROOT / "README.md").read_text()
    rooms = {p.name for p in PACKAGE.glob("*.py") if p.name != "__init__.py"}
    rooms |= {f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")}
    assert [name for name in sorted(rooms) if not re.search(rf"(?<![\w/]){re.escape(name)}", text)] == []
    block = next(b for b in re.findall(r"^```\n(.*?)^```", text, re.M | re.S) if "nanojax/\n" in b)
    mapped = [
        name for line in block.splitlines() for name in re.findall(r"(?:^|(?<=\s))[\w.]+(?:\.py|/)(?=\s|$)", line)
    ]
    assert len(mapped) > len(rooms)
    places = [ROOT, PACKAGE, *(p for p in PACKAGE.iterdir() if p.is_dir()), ROOT / "scripts"]
    assert [name for name in mapped if not any((place / name).exists() for place in places)] == []


@page
def test_paths_and_commands(page: Path) -> None:
    """Every link, path, module, --config and make target on a page exists."""
    text = page.read_text()
    for module in set(re.findall(r"python3? -m (nanojax[\w.]*)", text)):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for path in set(re.findall(r"\b((?:nanojax|scripts|configs|tests)/[\w/]+\.py)", text)):
        assert (ROOT / path).exists(), path
    for path in set(re.findall(r"`((?:\w+/)+\w+\.py)`", text)):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    for link in set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)):
        assert (page.parent / link).exists(), link
    for name in set(re.findall(r"--config[= ](\w+)", text)):
        assert name in config_files.available() or name.isupper(), name
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = re.findall(r"`make ([\w-]+)", text) + re.findall(r"^make ([\w-]+)", text, re.M)
    assert set(commands) <= targets, set(commands) - targets


def test_make_targets_are_written() -> None:
    """The Makefile's header says what each target does, and README has the two that a newcomer needs."""
    text = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"^# make ([\w-]+)", text, re.M)) == set(re.findall(r"^([\w-]+):", text, re.M))
    assert {"demo", "train"} <= set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text()))


@page
def test_keys(page: Path) -> None:
    """Every --section.key on a page is a key."""
    known = configs.keys(configs.Config())
    sections = {key.split(".")[0] for key in known}
    written = {key for key in re.findall(r"--([a-z]+\.[a-z_]+)", page.read_text()) if key.split(".")[0] in sections}
    assert written <= set(known), written - set(known)


@page
def test_parameter_counts(page: Path) -> None:
    """Where a page gives the exact count of a depth, it is that."""
    for depth, count in re.findall(r"\bd(\d+)\b[^\n]{0,40}?(\d{1,3}(?:,\d{3}){2,3}) parameters", page.read_text()):
        expected = config_rules.resolve(configs.Config(model=configs.Model(depth=int(depth)))).model.parameters
        assert int(count.replace(",", "")) == expected


@page
def test_plans_in_tables(page: Path) -> None:
    """A table row of configs has the peak, speed and days that these configs' docstrings have."""
    for first, *rest in cells(page.read_text()):
        plans = [plan_line(name) for name in re.findall(r"`(\w+)`", first)]
        peaks = next((re.findall(r"[\d.]+", c) for c in reversed(rest) if c.endswith("GiB")), [])
        at = next((i for i, c in enumerate(rest) if re.fullmatch(r"[\d.]+k(, [\d.]+k)*", c)), None)
        if not peaks or at is None:
            continue
        columns = [peaks, rest[at].split(", "), rest[at + 1].split(", ")]
        for i, plan in enumerate(plans):
            for column, exact in zip(columns, plan, strict=True):
                assert agree(column[i if len(column) > 1 else 0], exact), (first, column, plan)


def test_the_ladder() -> None:
    """The table of stored formats: bits per weight and state are those of the state's arrays."""
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    seen = []
    for first, *rest in (row for path in PAGES for row in cells(path.read_text())):
        bits = re.fullmatch(r"([\d.]+)(?: \+ (\d))?", rest[0])
        if not bits or not rest[1].endswith("GiB"):
            continue
        name = first.strip("`")
        seen.append(name)
        stored, rest_bits = step.block_bits(config_files.load(name))
        assert agree(bits[1], stored) and int(bits[2] or 0) == rest_bits, name
        assert agree(rest[1], size(step.abstract_state(config_files.load(name))) / 2**30), name
    assert seen == ["d32_4070", "d32_4070_nf4", "d32_4070_int3_adamw8", "d32_4070_b2p67"]


@pytest.mark.parametrize("name", config_files.available())
def test_config_docstrings(name: str) -> None:
    """Each config's docstring has its command, a GPU's also its plan (tests/plan/test_bars.py), and its counts are right."""
    docstring = ast.get_docstring(ast.parse(config_files.find(name).read_text())) or ""
    assert f"python -m nanojax.train --config={name}" in docstring
    if re.search(r"_(\d+x)?[3-9]\d{3}", name):  # a card; 2026 is a recipe
        assert PLAN.search(docstring)
    for count in re.findall(r"(\d{1,3}(?:,\d{3})+) parameters", docstring):
        assert int(count.replace(",", "")) == config_files.load(name).model.parameters


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files(path: Path) -> None:
    """Each file begins with a docstring line that says what it is for, and no function of the program is longer than a screen."""
    tree = ast.parse(path.read_text())
    assert (ast.get_docstring(tree) or "").strip(), "no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not path.is_relative_to(ROOT / "tests"):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LONGEST or f"{path.relative_to(ROOT)}:{node.name}" in LONG_FOR_A_REASON, (node.name, lines)


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            out.add(node.module.split(".")[0])
    return out


def test_dependencies() -> None:
    """Each dependency is imported by the program, and each package that the program imports is declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    normal = lambda requirement: re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")
    required = {normal(r) for r in project["dependencies"]}
    optional = {normal(r) for extra in project["optional-dependencies"].values() for r in extra}
    program = {name for p in SOURCES if not p.is_relative_to(ROOT / "tests") for name in imported(p)}
    packages = {
        name: {normal(d) for d in owners} for name, owners in importlib.metadata.packages_distributions().items()
    }
    used = {name: packages.get(name, {name.lower()}) for name in program - sys.stdlib_module_names - {"nanojax"}}
    assert required <= set().union(*used.values()), required - set().union(*used.values())
    own = {p.stem for p in SOURCES}
    absent = {n: d for n, d in used.items() if not d & (required | optional) and n not in own}
    assert absent.keys() <= {"pynvml", "lm_eval"}, (
        absent
    )  # of extras; their packages have other names: nvidia-ml-py, lm-eval


def test_nothing_of_this_machine() -> None:
    """No absolute path of a developer's machine in any tracked text."""
    others = (ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "LOG.md", ROOT / ".ci" / "run")
    for path in [*SOURCES, *PAGES, *others]:
        if path != Path(__file__):
            assert not re.search(r"(?<![\w.])/(work|home/\w+|root|Users)/", path.read_text()), path
