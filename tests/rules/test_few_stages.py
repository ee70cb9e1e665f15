"""A rule that teaches stages apart says where a chain leaves it nothing but backpropagation."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from netwright.catalogue.facets import methods
from netwright.contracts.checks import offered
from netwright.errors import FewStages
from netwright.rules import Backprop, DirectFeedbackAlignment, MonoForward, TwoStageBackward
from netwright.stages import stages

X = torch.randn(4, 5)
LOCAL = [entry.value for entry in methods().values() if entry.facets.kind == "rule"
         and entry.name.startswith("rules.") and ".local." in entry.value.__module__
         and "a chain of stages" in [*entry.facets.needs]]


def chain(stages: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(5, 8), nn.ReLU()]
    for _ in range(stages - 2):
        layers += [nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def said(rule: Any, network: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rule(network, **offered(rule, example=X))
    return [str(warning.message) for warning in seen if warning.category is FewStages]


def test_there_are_local_rules() -> None:
    assert len(LOCAL) > 4


@pytest.mark.parametrize("rule", LOCAL)
def test_a_local_rule_warns_of_two_stages_and_not_of_three(rule: Any) -> None:
    assert not said(rule, chain(3))
    try:
        [warning] = said(rule, chain(2))
    except ValueError as refused:
        assert "stages" in str(refused)  # noqa: PT017
        return
    assert "network reads as 2 stages (0, 2) of [1, 1] layers" in warning
    assert f"within a stage {rule.__name__} is backpropagation" in warning
    assert "cuts=" in warning


def test_other_rules_warn_where_a_stage_holds_several_layers() -> None:
    assert not said(DirectFeedbackAlignment, chain(2))
    deep = stages(chain(5), X, cuts=["0", "8"])
    assert "[4, 1] layers" in said(DirectFeedbackAlignment, deep)[0]
    assert "1 stages" in said(DirectFeedbackAlignment, stages(chain(5), X, cuts=["0"]))[0]


@pytest.mark.parametrize("rule", [Backprop, TwoStageBackward])
def test_exact_rules_are_backpropagation_anyway(rule: Any) -> None:
    assert not said(rule, stages(chain(5), X, cuts=["0"]))


def test_the_warning_names_the_line_that_made_the_rule() -> None:
    with pytest.warns(FewStages) as seen:
        MonoForward(chain(2))
    assert seen[0].filename == __file__
