"""This machine's card before a run trusts it: what it says of itself, whether our kernels are right and fast, what fits."""
