"""What is run: recipes, the job folders they are written to, and the runs they give."""
