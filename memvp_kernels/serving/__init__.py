"""Servers that read an image from the FFNs' memory instead of the prompt."""
