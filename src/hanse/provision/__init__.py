"""From one project.yaml to everybody's folder: the authority, the kits, the join tokens, and the files to start from."""
