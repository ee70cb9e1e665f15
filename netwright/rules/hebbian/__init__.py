"""Hebbian: from what a stage sees itself."""
