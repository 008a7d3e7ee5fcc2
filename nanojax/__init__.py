"""Trains nanochat's d32 from scratch on one 12 GB consumer GPU.

Importing nanojax has one side effect: where jax's CUDA plugin is installed without an NVIDIA driver, jax is made to use
the CPU and not to load the plugin (xla.hide_unusable_cuda).
"""

from nanojax import xla

xla.hide_unusable_cuda()
