"""The stages of a screen. Each says what is to do, fetches, computes and inserts."""
