"""Experts: feed-forward blocks of which each token uses a few."""

__all__: list[str] = []
