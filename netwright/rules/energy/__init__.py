"""Energy: neighbours answer one another."""
