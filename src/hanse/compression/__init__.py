"""Pure kernels that make what travels smaller."""
