"""Pure kernels for decision trees: bytes and arrays in, bytes and arrays out."""
