"""Learning rules: what can stand where `loss.backward()` stood."""

from netwright.rules.exact.backprop import Backprop
from netwright.rules.rule import Rule

__all__ = ["Backprop", "Rule"]
