"""HTTP connections, bodies and errors."""
