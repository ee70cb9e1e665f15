"""Token mixing: surgery on what mixes tokens."""
