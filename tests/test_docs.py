"""README, config docstrings and files against reality: what is written is there, and what is there is written."""

import ast
import re
from pathlib import Path

import jax
import pytest

from nanojax import config as configs
from nanojax import step

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("nanojax", "configs", "scripts", "tests") for p in (ROOT / folder).rglob("*.py"))


def _readme() -> str:
    return (ROOT / "README.md").read_text()


def test_file_map() -> None:
    """README's file map names every module of nanojax/ (a package by its folder) and nothing that is not there."""
    text = _readme()
    modules = {p.name for p in (ROOT / "nanojax").glob("*.py") if p.name != "__init__.py"}
    packages = {f"{p.parent.name}/" for p in (ROOT / "nanojax").glob("*/__init__.py")}
    missing = [name for name in sorted(modules | packages) if not re.search(rf"(?<![\w/]){re.escape(name)}", text)]
    assert not missing
    mapped = re.findall(r"^[ │├└─]*([\w/]+\.py|[\w.]+/)\s", text, re.M)
    assert mapped
    folders = [ROOT, ROOT / "nanojax", *(p for p in (ROOT / "nanojax").iterdir() if p.is_dir()), ROOT / "scripts"]
    assert [name for name in mapped if not any((folder / name).exists() for folder in folders)] == []


def test_paths_and_commands() -> None:
    """Every path in README's code and links exists, every python -m module too, every --config and make target."""
    text = _readme()
    for module in set(re.findall(r"python3? -m (nanojax[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for script in set(re.findall(r"\b((?:scripts|configs|tests)/[\w/]+\.py)", text)):
        assert (ROOT / script).exists(), script
    for link in set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)):
        assert (ROOT / link).exists(), link
    for name in set(re.findall(r"--config[= ](\w+)", text)):
        assert name in configs.available() or name.isupper(), name
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make (\w+)", text)) <= targets
    assert {"demo", "test"} <= set(re.findall(r"make (\w+)", text))


def test_keys_in_readme() -> None:
    """Every --section.key in README is a key."""
    known = configs.keys(configs.Config())
    sections = {key.split(".")[0] for key in known}
    written = {key for key in re.findall(r"--([a-z]+\.[a-z_]+)", _readme()) if key.split(".")[0] in sections}
    assert written <= set(known)


def test_parameter_counts_in_readme() -> None:
    """Where README gives the exact count of a depth, it is that."""
    for depth, count in re.findall(r"\bd(\d+)\b[^\n]{0,40}?(\d{1,3}(?:,\d{3}){2,3}) parameters", _readme()):
        expected = configs.resolve(configs.Config(model=configs.Model(depth=int(depth)))).model.parameters
        assert int(count.replace(",", "")) == expected


def test_ladder_in_readme() -> None:
    """README's ladder: bits a weight and state are those of the state's arrays, peak and speed those of the configs' plans."""
    row = r"\| `(d32_4070\w*)` \| ([\d.]+)(?: \+ (\d))? \| ([\d.]+) GiB \| ([\d.]+ GiB) \| ([\d.]+k) \| (\d+) \|"
    rows = re.findall(row, _readme())
    assert [r[0] for r in rows] == ["d32_4070", "d32_4070_nf4", "d32_4070_int3_adamw8", "d32_4070_b2p67"]
    total = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    for name, bits, remainder, state, peak, rate, days in rows:
        stored, rest = step.block_bits(configs.load(name))
        assert float(bits) == pytest.approx(stored, abs=0.005) and int(remainder or 0) == rest, name
        assert float(state) == pytest.approx(total(step.abstract_state(configs.load(name))) / 2**30, abs=0.005), name
        assert f"peak {peak}, {rate} tok/s modelled, {days} days" in configs.find(name).read_text()


@pytest.mark.parametrize("name", configs.available())
def test_config_docstrings(name: str) -> None:
    """Each config's docstring has its command, a GPU's also its plan (test_plan_compile.py), and its counts are right."""
    docstring = ast.get_docstring(ast.parse(configs.find(name).read_text())) or ""
    assert f"python -m nanojax.train --config={name}" in docstring
    if re.search(r"_\d{4}", name):
        assert re.search(
            r"^plan \(\w+\): peak [\d.]+ GiB, [\d.]+k? tok/s modelled, [\d.]+ (days|hours)$", docstring, re.M
        )
    for count in re.findall(r"(\d{1,3}(?:,\d{3})+) parameters", docstring):
        assert int(count.replace(",", "")) == configs.load(name).model.parameters


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files(path: Path) -> None:
    """Each file begins with a docstring line that says what it is for, and none of the program has 450 lines."""
    text = path.read_text()
    assert (ast.get_docstring(ast.parse(text)) or "").strip(), "no docstring"
    if path.parts[-2] != "tests":
        assert len(text.splitlines()) < (500 if path.name == "config.py" else 450)  # the table of all keys


def test_nothing_of_this_machine() -> None:
    """No absolute path of a developer's machine in any tracked text."""
    for path in [*SOURCES, ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "LOG.md"]:
        if path != Path(__file__):
            assert not re.search(r"(?<![\w.])/(work|home/\w+|root|Users)/", path.read_text()), path
