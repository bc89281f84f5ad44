"""The bricks of a forward pass as compiled steps, computed at once or recorded as a program for later decode steps."""
