"""Python's garbage collector in processes that are about one program."""

import gc


def leave_out_what_is_alive() -> None:
    """Makes the collector pass over all objects that exist now, until it is called again.

    For a server that has just opened its model, or closed one. A full collection goes through every module
    and kernel launcher, 65 000 objects and 20 to 45 ms, and 256 sequences cause one every 300 steps of 2.3 ms. What
    becomes garbage later stays if only the collector could find it, so that a program that drops models without
    closing them must not call this.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
