"""What turns graphs into programs, and loads programs again: one package or file a backend."""
