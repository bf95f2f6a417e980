"""Machines seen from outside: their directories, starting workers, the client of their API."""
