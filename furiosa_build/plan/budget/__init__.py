"""What a build takes of disk, memory and time, and whether that is there."""
