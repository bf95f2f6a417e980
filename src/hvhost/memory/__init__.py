"""Dynamic memory: what the guest's driver is told, and apart from it, what it should have."""
