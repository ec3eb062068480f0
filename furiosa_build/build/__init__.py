"""The build: what is done, what is to do, and how it is run."""
