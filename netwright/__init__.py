"""netwright: change how a PyTorch network is built, trained and run, and measure each change."""

from netwright.runtime.faces import face
from netwright.runtime.version import __version__ as __version__

face(
    __name__,
    rooms={
        "blocks": "netwright.blocks",
        "boosting": "netwright.models.boosting",
        "circuits": "netwright.formal.circuits",
        "contracts": "netwright.contracts",
        "data": "netwright.data",
        "errors": "netwright.errors",
        "evidence": "netwright.evidence",
        "flows": "netwright.generative.flows",
        "generative": "netwright.generative",
        "learners": "netwright.formal.learners",
        "measure": "netwright.measure",
        "models": "netwright.models",
        "objectives": "netwright.objectives",
        "optim": "netwright.optim",
        "papers": "netwright.catalogue.papers",
        "reshape": "netwright.reshape",
        "rules": "netwright.rules",
    },
    names={
        "Anatomy": "netwright.anatomy.anatomy",
        "History": "netwright.training",
        "Recipe": "netwright.compare.recipe",
        "Stages": "netwright.stages",
        "Task": "netwright.tasks",
        "anatomy": "netwright.anatomy.anatomy",
        "apply": "netwright.compare.apply",
        "changes": "netwright.reshape.change",
        "compare": "netwright.compare",
        "find": "netwright.catalogue.find",
        "fit": "netwright.training",
        "fixed_point": "netwright.numerics",
        "load": "netwright.reshape.saved",
        "method": "netwright.catalogue.facets",
        "parallel_forward": "netwright.stages",
        "parallel_recurrence": "netwright.stages",
        "recipe": "netwright.compare.recipe",
        "recorded": "netwright.compare",
        "save": "netwright.reshape.saved",
        "stages": "netwright.stages",
    },
)
