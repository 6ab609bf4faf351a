"""Pure kernels that tell how good a model is, how sure that is, and whether data has changed."""
