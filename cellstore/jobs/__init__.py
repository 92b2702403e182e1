"""What was done, by which recipe, and what is left to do: queue, workers, runs."""
