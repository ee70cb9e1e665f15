"""A network as a chain of stages."""

from netwright.stages.find import stages
from netwright.stages.stage import Stage, Stages, call

__all__ = ["Stage", "Stages", "call", "stages"]
