"""How tasks and updates move: the courier a workflow relies on, and the ways bytes travel."""
