"""The order of nanojax's rooms: a module imports from its own room and from those before it; names say what is inside."""

import ast
from pathlib import Path

ORDER = """cli files < hardware fields weights < config config_rules config_files tokenizer recipe < conversation xla
    quant < ops < model < step engine < run sample chat plan data tasks < interop evaluate status serve card < report
    questions doctor < rollouts < source < follow < train < tuning < sft rl"""
ONLY = {
    "data": {"cli", "files", "tokenizer"},
    "tasks": {"cli", "files", "tokenizer", "conversation", "data"},
}  # without jax
LEVEL = {room: level for level, rooms in enumerate(ORDER.split("<")) for room in rooms.split()}
PACKAGE = Path(__file__).parents[1] / "nanojax"
EMPTY_NAMES = {"utils", "util", "helpers", "common", "misc", "base", "manager", "factory", "registry"}


def imports(source: str) -> set[str]:
    """Every module of nanojax that `source` imports, also inside functions: {"cli", "data.loader"}."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("nanojax.") for name in found if name.startswith("nanojax.")}


def violations(module: str, source: str) -> list[str]:
    """What `module` ("step.optim") must not import."""
    room = module.split(".")[0]
    out = []
    for name in sorted(imports(source)):
        other = name.split(".")[0]
        allowed = other in ONLY[room] if room in ONLY else LEVEL[other] <= LEVEL[room]
        if (other != room and not allowed) or "__main__" in name.split("."):
            out.append(f"{module} imports {name}")
    return out


def test_rooms_import_from_rooms_before_them() -> None:
    """Over all of nanojax/, imports inside functions too; no room is missing from the order."""
    out = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module not in ("__init__", "__main__"):
            out += violations(module, path.read_text())
    assert out == []


def test_an_import_upwards_is_seen() -> None:
    """A layer that asks the step, data that reads a config, a command that is imported; in a function and by alias."""
    assert violations("ops.linear", "from nanojax.quant import decode\ndef f():\n from nanojax import step as s") == [
        "ops.linear imports step"
    ]
    assert violations("data.loader", "import nanojax.config\nfrom nanojax import cli") == ["data.loader imports config"]
    assert violations("train", "from nanojax.plan.__main__ import main") == ["train imports plan.__main__.main"]


def test_names_say_what_is_inside() -> None:
    """No room for odds and ends."""
    assert [str(p) for p in PACKAGE.rglob("*") if p.stem in EMPTY_NAMES] == []
