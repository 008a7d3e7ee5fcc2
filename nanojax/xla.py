"""How jax is set up before a run touches a device: memory share, compilation cache, remat pass."""

import logging
import os
from pathlib import Path

import jax

MEMORY = "0.92"  # of the GPU's memory for XLA's pool; its default of 0.75 would leave 2 GB of a 12 GB card unused


def configure() -> None:
    """Call before the first computation. Whatever the user set through jax's own environment variables is respected."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the old name; jax refuses both at once
    if not any(name in os.environ for name in names):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = MEMORY
    # XLA's own pass recomputes matmuls when it thinks that memory is short; compute.residuals says what is recomputed.
    jax.config.update("jax_compiler_enable_remat_pass", False)
    if not getattr(jax.config, "jax_compilation_cache_dir", None):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanojax" / "jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every save in several lines


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA failed to find memory, at compile or at run time."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
