"""The server's side of a job: its run folder, what a person sees while it runs, and the report they read afterwards."""
