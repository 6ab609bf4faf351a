"""A client labels its own images, on its own machine: which to look at first, what was said, and what to train on."""
