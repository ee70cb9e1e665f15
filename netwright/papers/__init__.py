"""The catalogue of 635 papers, with what implements and what shows each."""

from netwright.papers.catalogue import FAMILIES, Paper, find, paper, papers, resolve

__all__ = ["FAMILIES", "Paper", "find", "paper", "papers", "resolve"]
