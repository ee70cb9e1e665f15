"""Every method of netwright's is held to its kind's contract."""

import pytest

import netwright as nw
from netwright.catalogue.facets import methods
from netwright.contracts.checks import variants
from netwright.errors import MissingExtra

KINDS = [name.removeprefix("check_") for name in nw.contracts.__all__ if name.startswith("check_")]


def cases():
    for method in methods().values():
        kind = method.facets.kind
        for check in nw.contracts.checks(kind) if kind in KINDS else []:
            labels = list(variants(method.value))
            for label in labels if check.thorough else labels[:1]:
                name = f"{method.name} ({label})" if label else method.name
                yield pytest.param(method.value, label, check, id=f"{name}: {check}")


def test_every_kind_with_a_contract_has_methods():
    assert set(KINDS) <= {method.facets.kind for method in methods().values()}
    assert len(KINDS) == len(set(KINDS)) > 0


@pytest.mark.parametrize(("method", "variant", "check"), cases())
def test_it_keeps_to_its_kinds_contract(method, variant, check):
    try:
        check(method, variant=variant)
    except MissingExtra as missing:
        pytest.skip(str(missing))
