"""What modules return, and what stands for those that went, as plain data and back."""

from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from netwright.anatomy.residual import Given, Place, Silent


def plain_layout(layout: Any) -> dict[str, Any]:
    """Return a module's output as plain data, the stream's place marked in it.

    >>> layout_of(plain_layout((Place.STREAM, None))) == (Place.STREAM, None)
    True
    """
    leaves, kind = tree_flatten(layout)
    return {"leaves": [{"stream": True} if leaf is Place.STREAM else
                       {"given": list(leaf.path)} if isinstance(leaf, Given) else leaf
                       for leaf in leaves], "tree": treespec_dumps(kind)}


def layout_of(said: dict[str, Any]) -> Any:
    """Return what `plain_layout` described."""
    leaves = [Place.STREAM if leaf == {"stream": True} else
              Given(tuple(leaf["given"])) if isinstance(leaf, dict) else leaf
              for leaf in said["leaves"]]
    return tree_unflatten(leaves, treespec_loads(said["tree"]))


def plain_silent(silent: Silent) -> dict[str, Any]:
    """Return what stands for a module that went as plain data."""
    return {"width": silent.width, "layout": plain_layout(silent.layout)}


def silent_of(said: dict[str, Any]) -> Silent:
    """Return what `plain_silent` described."""
    return Silent(said["width"], layout_of(said["layout"]))
