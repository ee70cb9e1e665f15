"""What experiments on the papers' claims are written with, and how they are found, run and kept.

The experiments themselves stand in the folder `evidence` beside the package.
"""

from netwright.runtime.faces import face

face(__name__)
