"""Queries the exported model as its clients will, before it is pushed."""
