"""What knows nothing of a model: errors, devices, files, memory, progress."""
