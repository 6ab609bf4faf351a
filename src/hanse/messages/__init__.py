"""What travels between server and sites: `Task` down, `Update` up, one `FLModel` in each, and the frames they become."""
