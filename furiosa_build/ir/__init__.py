"""The data that crosses borders between packages: frozen, plain, without torch."""
