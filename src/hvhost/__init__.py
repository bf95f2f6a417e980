"""hvhost: a Hyper-V host for Linux and FreeBSD guests, in Python."""
