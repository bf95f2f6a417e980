"""Integration services: heartbeat, shutdown."""
