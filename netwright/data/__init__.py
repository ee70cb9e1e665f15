"""Data sets: those that ship with a library, and real ones under `NETWRIGHT_DATA`."""

from netwright.data.batches import Batches
from netwright.data.graphs import Graph, citeseer, cora, karate
from netwright.data.images import Split, cifar10, digits, mnist
from netwright.data.mnist1d import mnist1d
from netwright.data.text import CHARACTERS, characters, pydoc_text, tinyshakespeare

__all__ = ["CHARACTERS", "Batches", "Graph", "Split", "characters", "cifar10", "citeseer", "cora",
           "digits", "karate", "mnist", "mnist1d", "pydoc_text", "tinyshakespeare"]
