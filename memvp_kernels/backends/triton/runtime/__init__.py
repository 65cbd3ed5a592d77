"""The host's side of a launch: device and precision, TMA descriptors."""
