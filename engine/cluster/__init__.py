"""Several replicas of the server on a Ray cluster, behind one address. Loaded by `serve --ray` alone.

front.py takes the requests of clients, router.py chooses the replica for each by what the replicas have read before
(prefixes.py), replica.py is the server of one machine without its socket, and application.py puts them together.
"""
