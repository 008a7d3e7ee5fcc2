"""Differentiable operations with hand-written backwards; they know no model."""
