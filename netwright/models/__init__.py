"""Small whole networks to try changes on."""

from netwright.models.cnn import cnn
from netwright.models.gcn import gcn
from netwright.models.gpt import gpt
from netwright.models.mlp import mlp

__all__ = ["cnn", "gcn", "gpt", "mlp"]
