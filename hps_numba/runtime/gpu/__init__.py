"""The GPU cache in the way of a lookup."""
