"""Guests built from distribution packages, and the probe that runs inside them."""
