"""Discrete: through a circuit of bits, as bits."""
