"""Recurrent mixers in plain numpy, float32 throughout: one file per mixer, with its formula as functions of arrays.

Every token of a sequence is one step with the same operations in the same order, so its bits depend on the state before
it alone: not on how a prompt was cut into pieces, nor on the rest of the batch. Letters: T tokens, I channels,
S states of a channel, W width of a convolution, H heads.
"""
