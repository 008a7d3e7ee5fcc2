"""One page about a run, from what its stages left in their folders; never imports jax."""
