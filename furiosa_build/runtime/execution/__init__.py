"""Runs programs: replicas, stages, ranks."""
