"""How jax and XLA are set up: an unusable CUDA plugin is hidden, and comes back for the planner."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanojax import hardware, xla
from nanojax.cli import UserError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    hardware.nvidia_driver() or not xla.cuda_compiler_installed(), reason="needs the CUDA plugin and no NVIDIA driver"
)


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs `code` without any of jax's variables but these."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TF_CPP", "XLA_"))}
    environment = {**clean, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_importing_nanojax_does_not_import_jax() -> None:
    """Each tokenizing process saves 0.7 s."""
    assert run("import nanojax, sys; print('jax' in sys.modules)").stdout == "False\n"


def test_jax_is_quiet_and_on_the_cpu() -> None:
    """The plugin is not loaded: no line on stderr, CPU devices, without any variable set by hand."""
    done = run("import nanojax, jax; print(jax.devices()[0].platform, float(jax.numpy.ones(3).sum()))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu 3.0\n", "")


@pytest.mark.long
def test_the_compiler_comes_back_quietly() -> None:
    """The planner's compiler knows an absent card; stderr stays empty; computation stays on the CPU."""
    done = run(
        "from nanojax.plan import compile; compile.start_compiler(); import jax; from nanojax import hardware, xla;"
        "print(xla.absent_gpu(hardware.CARDS['h100'].target_config()).platform, jax.default_backend())"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "gpu cpu\n", "")


@pytest.mark.long
def test_it_cannot_come_back_to_a_jax_that_was_imported_without_it() -> None:
    """jax looks for cuDNN while it is imported, so a late planner says what to do."""
    done = run("import nanojax, jax; from nanojax.plan import compile; compile.start_compiler()")
    assert "UserError: jax was imported without its CUDA plugin; plan in a new process" in done.stderr


def test_a_choice_of_the_user_is_kept() -> None:
    """With JAX_PLATFORMS=cuda nothing is hidden: jax itself says why it cannot."""
    done = run("import nanojax, sys; print(sys.modules.get('jax_plugins.xla_cuda12'))", JAX_PLATFORMS="cuda")
    assert done.stdout == "None\n"


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(platform: str) -> None:
    """JAX_PLATFORMS asks for it: UserError instead of jax's tracebacks."""
    code = "from nanojax import cli, xla; cli.run_main(xla.configure)"
    done = run(code, JAX_PLATFORMS=platform)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and f"JAX_PLATFORMS={platform}: no such device here" in errors[0]
    assert "Traceback" not in done.stderr


HIDDEN = "import nanojax, jax; from nanojax import cli, hardware, xla; hardware.nvidia_driver = lambda *_: True; "


def test_a_gpu_that_jax_does_not_find_is_one_line() -> None:
    """With a driver and the plugin a run does not go on quietly on the CPU, unless the CPU or no GPU was asked for."""
    code = HIDDEN + "xla.cuda_compiler_installed = lambda: True; cli.run_main(xla.configure)"
    here = {"JAX_PLATFORMS": ""}
    done = run("import os, jax; jax.config.update('jax_platforms', 'cpu');" + code, **here)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: jax does not find this machine's GPU"
    )
    for chosen in ({"JAX_PLATFORMS": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}):
        done = run("import jax; jax.config.update('jax_platforms', 'cpu');" + code, **(here | chosen))
        assert done.returncode == 0, (chosen, done.stderr)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "abc"}, "XLA_PYTHON_CLIENT_MEM_FRACTION=abc: expected a share"),
        ({"XLA_CLIENT_MEM_FRACTION": "2"}, "at most 1"),
        ({"XLA_CLIENT_MEM_FRACTION": "0"}, "above 0"),
        ({"XLA_CLIENT_MEM_FRACTION": "nan"}, "above 0"),
        ({"XLA_CLIENT_MEM_FRACTION": ".5", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, "unset one"),
        ({xla.ALLOCATOR: "nonsense"}, "expected one of default, cuda_async"),
    ],
)
def test_wrong_memory_variables(environ: dict[str, str], said: str) -> None:
    """Each is named before jax starts; what jax takes is not."""
    with pytest.raises(UserError, match=said):
        xla.check_memory_variables(environ)
    xla.check_memory_variables({"XLA_CLIENT_MEM_FRACTION": "0.9", xla.ALLOCATOR: "cuda_async"})


def test_a_cache_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in its place is seen, so that jax is not told to write there."""
    (tmp_path / "file").touch()
    for folder, usable in (("file", False), ("file/deep", False), ("new/deep", True)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
        assert xla.cache_usable() is usable, folder


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches go to the system's folder for temporary files."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert xla.user_cache().name == f"nanojax-{os.getuid()}" and xla.user_cache().is_absolute()
