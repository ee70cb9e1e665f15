"""Blocks that mix tokens with linear layers in place of attention."""

__all__: list[str] = []
