"""Scores of a trained model: bits per byte, CORE, lm-evaluation-harness."""
