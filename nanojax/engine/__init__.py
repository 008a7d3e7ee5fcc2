"""Text from a model: rows decoded together in one compiled loop, with a calculator that they may call."""
