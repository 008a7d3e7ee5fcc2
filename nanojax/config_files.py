"""Config files and command lines: `load("d12_4070", ["--model.depth=8"])` finds `configs/d12_4070.py` and overrides a key."""

import dataclasses
import difflib
import importlib.machinery
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from nanojax import config as configs
from nanojax import config_rules
from nanojax.cli import UserError
from nanojax.config import Config


def find(name: str) -> Path:
    """The config file of that name or path. Looks in ./configs, beside the package, and in the installed package."""
    name = os.path.expanduser(name)
    if name.endswith(".py") or os.sep in name:
        if not Path(name).is_file():
            raise UserError(f"--config={name}: no such file")
        if not name.endswith(".py"):
            raise UserError(f"--config={name}: is not a config file, whose name ends in .py")
        return Path(name)
    for folder in _folders():
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py"
    names = available()
    near = difflib.get_close_matches(name, names, 3, 0.4)
    no_config = "is not a config file, whose name ends in .py" if Path(name).is_file() else "no such config"
    raise UserError(
        f"--config={name}: {no_config}; "
        + (f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}")
    )


def available() -> list[str]:
    """Names of all configs that `find` finds, sorted."""
    return sorted({p.stem for folder in _folders() for p in folder.glob("*.py") if not p.stem.startswith("_")})


def _folders() -> list[Path]:
    package = Path(__file__).parent
    return [Path("configs"), package.parent / "configs", package / "configs"]


def load_unresolved(name: str) -> Config:
    """The config as its file gives it, before `resolve`. UserError when the file is missing or does not work."""
    path = find(name)
    name = f"nanojax_config_{path.stem}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{path}: {type(error).__name__}: {error}; a config file needs get_config() -> Config"
        ) from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, expected nanojax.config.Config")
    return dataclasses.replace(config, name=path.stem)


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Config `name` (or path) with the overrides of a command line, resolved and checked."""
    return config_rules.resolve(configs.override(load_unresolved(name), pairs(overrides)))


def pairs(arguments: Sequence[str]) -> dict[str, str]:
    """{"section.key": text} of arguments `--section.key=value` and `--section.key value`."""
    known, pairs, left = configs.keys(Config()), {}, list(arguments)
    while left:
        argument = left.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UserError(f"{argument}: expected --section.key=value")
        if key not in known:
            raise configs.unknown(key, known)
        if not equals:
            if not left or left[0].startswith("--"):
                raise UserError(f"{argument}: has no value; expected --section.key=value")
            value = left.pop(0)
        pairs[key] = value
    return pairs


def typed(arguments: Sequence[str]) -> frozenset[str]:
    """The keys and options that a command line names: {"train.steps", "config"}."""
    return frozenset(a.removeprefix("--").partition("=")[0] for a in arguments if a.startswith("--"))
