"""Querying pushed models; imports neither tfx nor trainer."""
