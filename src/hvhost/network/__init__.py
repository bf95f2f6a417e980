"""The network adapter (netvsc), the virtual switch and its uplinks."""
