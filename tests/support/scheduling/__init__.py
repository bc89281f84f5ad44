"""Runners that show what became of every page and state, and step loops under random use."""
