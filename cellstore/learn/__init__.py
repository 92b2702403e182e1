"""Networks and baselines: their inputs, training, checkpoints."""
