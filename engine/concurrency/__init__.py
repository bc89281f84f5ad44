"""Locks that outlast asynchronous exceptions and forks, and the garbage collector of a server."""
