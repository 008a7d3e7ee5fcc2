"""Differentiable operations with hand-written backward passes. Of the config they know only Compute."""
