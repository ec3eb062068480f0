"""furiosa_build: from a short recipe to a versioned, verified artifact of a large language model."""

__version__ = "0.1.0"
