"""Exchanging modules, whatever they are."""
