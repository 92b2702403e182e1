"""The web explorer: pages about a store, served on this machine."""
