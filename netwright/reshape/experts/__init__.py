"""Surgery that makes experts, or changes those that are there."""

from netwright.runtime.faces import face

face(__name__)
