"""The conversations that a model is fine-tuned on, from files, from the hub and generated; without jax."""
