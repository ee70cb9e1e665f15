"""Residual networks: surgery on their blocks."""
