"""The papers, what of them netwright has, and how it is found."""
