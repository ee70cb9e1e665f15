import importlib.util
import json
import warnings

import pytest

from netwright.catalogue.facets import methods
from netwright.catalogue.names import locate, name_of, short_name
from netwright.compare.recipe import SLOT_OF, recipe


@pytest.mark.parametrize("name", methods())
def test_every_method_is_a_recipe_or_says_why_not(name):
    method = methods()[name]
    assert name_of(method.value) == name
    assert locate(short_name(name)) is locate(f"nw.{name}") is method.value
    if method.facets.kind not in SLOT_OF:
        with pytest.raises(ValueError, match=f"is of the kind {method.facets.kind}") as caught:
            recipe(name)
        assert "\n" not in str(caught.value)
        return
    found = recipe(name)
    assert str(found) == short_name(name)
    assert recipe(json.loads(json.dumps(found.plain()))) == found


@pytest.mark.check
def test_every_method_runs_on_a_task_or_says_why_in_a_line():
    spec = importlib.util.spec_from_file_location("nameable", "benchmarks/nameable.py")
    nameable = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nameable)
    tasks = nameable.local_tasks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: nameable.tried(method, tasks) for name, method in methods().items()
                 if method.facets.kind in SLOT_OF}
    for name, (ran, reason) in found.items():
        assert ran or (reason and "\n" not in reason), name
    assert sum(bool(ran) for ran, _ in found.values()) > 0.7 * len(found)
