"""Pure kernels that make one model of many updates, and take a step with it. They know nothing of files, clocks or networks."""
