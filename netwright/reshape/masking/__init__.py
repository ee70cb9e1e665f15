"""Networks whose zeros are chosen while they train."""

from netwright.runtime.faces import face

face(__name__)
