"""Estimators: one number for the whole network."""
