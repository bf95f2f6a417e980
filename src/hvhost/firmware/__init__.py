"""Ways to start a guest: Linux boot protocol, PVH."""
