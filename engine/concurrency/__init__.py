"""Locks that outlast asynchronous exceptions and forks."""
