"""One experiment for each claim of a paper, and in `results` what was measured."""
