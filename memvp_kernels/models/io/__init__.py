"""Adapters on disk: our own files and the official checkpoints."""
