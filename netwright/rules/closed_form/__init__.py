"""Closed form: each stage is solved for."""
