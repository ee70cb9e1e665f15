"""Attention layers, found by their softmax between two products of activations."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from netwright.anatomy.products import Product, factors
from netwright.anatomy.run import Operation, Run

__all__ = ["Attention"]


@dataclass(frozen=True)
class Attention:
    """Where an attention layer is: softmax(q k^T) v, and what projects its parts.

    Attributes:
        name: the smallest module that holds it.
        query: the layer that gives q, or the parameter that does where no module is its own;
            None where it cannot be told.
        key: the layer that gives k.
        value: the layer that gives v.
        out: the layer that reads the result.
        heads: how many heads q has.
        key_heads: how many k and v have, fewer where several heads share one.
        head_dim: size of a head.
        fused: whether one layer gives q, k and v.
        cross: whether k is made of another signal than q.
    """

    name: str
    query: str | None
    key: str | None
    value: str | None
    out: str | None
    heads: int | None
    key_heads: int | None
    head_dim: int
    fused: bool
    cross: bool


@dataclass(frozen=True, eq=False)
class _Core:
    """The tensors of one attention, and the operations it is made of."""

    query: int
    key: int
    value: int
    gave: int
    operation: Operation


def attentions(run: Run, products: list[Product]) -> dict[int, Attention]:
    """Return the attention layers by the value that each gives before its last projection."""
    made = {product.gave: product for product in products}
    made |= {product.operation.gave[0]: product for product in products}
    found: dict[int, Attention] = {}
    for core in _cores(run):
        layer = _layer(run, core, made)
        if layer is not None:
            found[core.gave] = layer
    return found


def _cores(run: Run) -> Iterator[_Core]:
    for operation in run.operations:
        if operation.name.startswith("_scaled_dot_product"):
            query, key, value = operation.taken[:3]
            yield _Core(query, key, value, operation.gave[0], operation)
        elif operation.name in ("_softmax", "_safe_softmax"):
            yield from _written_out(run, operation)


def _written_out(run: Run, softmax: Operation) -> Iterator[_Core]:
    """Yield the attention whose softmax is an operation of its own."""
    scores = softmax.taken[0]
    if softmax.arguments[0][1] not in (-1, len(run.shapes[scores]) - 1):
        return
    first = _product_before(run, scores)
    for second, value in _products_after(run, softmax.gave[0]):
        if first is not None:
            query, key = first
            yield _Core(query, key, value, second.gave[0], second)


def _product_before(run: Run, number: int) -> tuple[int, int] | None:
    """Return the factors of the product of activations that `number` was made of."""
    waiting = [number]
    while waiting:
        operation = run.maker.get(waiting.pop())
        if operation is None:
            continue
        pair = factors(operation)
        if pair is not None and all(run.taught[n] and run.fed[n] for n in pair):
            return pair
        if operation.layout or operation.elementwise or operation.name == "cat":
            waiting += [n for n in operation.taken if run.taught[n] and run.fed[n]]
    return None


def _products_after(run: Run, number: int) -> Iterator[tuple[Operation, int]]:
    """Yield the products that weigh a tensor by `number`, and that tensor."""
    waiting = [number]
    while waiting:
        number = waiting.pop()
        for operation in run.readers[number]:
            pair = factors(operation)
            if pair is not None:
                if pair[0] == number and run.taught[pair[1]] and run.fed[pair[1]]:
                    yield operation, pair[1]
            elif operation.layout or operation.elementwise:
                waiting.append(operation.gave[0])


def _layer(run: Run, core: _Core, made: dict[int, Product]) -> Attention | None:
    query, key, value = (_projection(run, n, made) for n in (core.query, core.key, core.value))
    if query is None and key is None and value is None:
        return None
    out = _reader(run, core.gave, made)
    size = run.shapes[core.query][-1]
    fused = query is not None and key is not None and value is not None and (
        query.name == key.name == value.name)
    heads = _heads(run, core.query, query, size)
    key_heads = _heads(run, core.key, key, size)
    if query is not None and key is not None and value is not None:
        if fused and heads is not None:
            key_heads = (query.outputs // size - heads) // 2
        elif key.outputs % size == 0 and key.name not in (query.name, value.name):
            key_heads = key.outputs // size
    calls = [p.operation.call for p in (query, key, value, out) if p is not None]
    chains = [call.around() for call in [*calls, core.operation.call] if call is not None]
    name = next(call.name for call in chains[0] if all(call in chain for chain in chains))
    cross = query is not None and key is not None and (
        run.source(query.taken) != run.source(key.taken))
    names = [None if p is None else p.name for p in (query, key, value, out)]
    return Attention(name, names[0], names[1], names[2], names[3], heads, key_heads, size, fused,
                     cross)


def _projection(run: Run, number: int, made: dict[int, Product]) -> Product | None:
    """Return the one product with weights that `number` comes from, None where there are more."""
    found: set[Product] = set()
    seen: set[int] = set()
    waiting = [number]
    while waiting:
        number = waiting.pop()
        if number in seen or not (run.taught[number] and run.fed[number]):
            continue
        seen.add(number)
        operation = run.maker.get(number)
        if number in made:
            found.add(made[number])
        elif operation is None or factors(operation) or operation.name == "embedding":
            return None
        else:
            waiting += operation.taken
    return found.pop() if len(found) == 1 else None


def _reader(run: Run, number: int, made: dict[int, Product]) -> Product | None:
    """Return the one product with weights that reads `number`, None where anything else does."""
    readers = {id(product.operation): product for product in made.values()}
    found: set[Product] = set()
    waiting = [number]
    while waiting:
        number = waiting.pop()
        for operation in run.readers[number]:
            if id(operation) in readers:
                found.add(readers[id(operation)])
            elif operation.layout or (operation.elementwise and operation.name != "add"):
                waiting.append(operation.gave[0])
    return found.pop() if len(found) == 1 else None


def _heads(run: Run, number: int, product: Product | None, size: int) -> int | None:
    """Return how many heads of `size` a tensor has for each token."""
    if product is None:
        return None
    tokens = prod(run.shapes[product.gave]) // product.outputs
    heads, rest = divmod(prod(run.shapes[number]), tokens * size)
    return heads if heads and not rest else None
