"""Arithmetic on updates: no messages, no sockets, no torch."""
