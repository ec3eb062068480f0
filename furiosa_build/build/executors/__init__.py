"""What runs steps: in this process, in worker processes."""
