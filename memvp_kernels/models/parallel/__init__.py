"""Models that are sharded, quantized or checkpointed: what that changes for the memory."""
