"""Where weights come from: directories, the hub, single files, a seed."""
