"""Which implementation and which tile a step runs with: a deterministic cost model in plain Python."""
