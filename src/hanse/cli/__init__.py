"""The command `hanse`: each command is a few lines over a public function."""
