"""Small whole networks to try changes on."""

from netwright.models.cnn import cnn
from netwright.models.gcn import gcn
from netwright.models.gpt import gpt
from netwright.models.mlp import mlp
from netwright.models.patch_transformer import patch_transformer

__all__ = ["cnn", "gcn", "gpt", "mlp", "patch_transformer"]
