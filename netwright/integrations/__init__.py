"""Rules in the training loops of other libraries."""

from netwright.runtime.faces import face

face(__name__)
