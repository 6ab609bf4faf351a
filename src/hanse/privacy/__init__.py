"""Pure kernels that bound and blur what one site's update tells about its data."""
