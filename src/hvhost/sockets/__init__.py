"""Hyper-V sockets: byte streams between programs in the guest and Unix sockets on the host."""
