"""Surgery that makes experts, or changes those that are there."""
