"""The host side of a launch."""
