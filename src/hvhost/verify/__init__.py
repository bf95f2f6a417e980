"""The feature contract, run against a live guest."""
