"""How fast an artifact is on this machine."""
