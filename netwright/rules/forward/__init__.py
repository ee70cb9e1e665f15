"""Forward: in the input, or along a direction."""
