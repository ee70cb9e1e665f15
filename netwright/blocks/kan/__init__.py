"""Kolmogorov-Arnold blocks: the functions on the edges are learned."""

__all__: list[str] = []
