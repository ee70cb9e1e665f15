"""Exact: back through every stage."""
