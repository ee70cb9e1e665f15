"""Changes, seeds and tuning: what is compared, and how it is run and kept."""

from netwright.runtime.faces import face

face(__name__)
