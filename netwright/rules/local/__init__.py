"""Local: every stage has a loss of its own."""
