"""From a BuildSpec to steps: what there is to do and what each step depends on. Nothing here imports torch."""
