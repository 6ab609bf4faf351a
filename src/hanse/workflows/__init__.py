"""One async function each, that runs a job from top to bottom and reads like the paper's pseudocode."""
