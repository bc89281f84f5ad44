"""Parts of the bricks of ops.py that have a subject of their own."""
