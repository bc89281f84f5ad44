"""The bricks of a forward pass in numpy (`ops`), and the parts of them that have files of their own."""
