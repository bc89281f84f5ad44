"""Servers in this process or in one of their own, their clients, and a hub on this machine."""
