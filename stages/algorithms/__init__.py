"""Pure functions over tensors, one technique a file."""
