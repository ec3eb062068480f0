"""Planning: which steps a BuildSpec needs, and what each of them depends on. Nothing here imports torch."""
