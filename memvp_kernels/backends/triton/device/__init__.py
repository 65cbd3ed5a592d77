"""Device functions that the kernels share: tile loads, segments, activations, dropout, programmatic dependent launch."""
