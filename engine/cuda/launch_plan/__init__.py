"""What a model launches on a card, layer by layer: the one description that everything else derives from.

Uploads, kernel builds, the memory plan, dispatch, profiles and `inspect --launches` read it. Pure: it needs neither a
GPU nor CuPy, and holds names, types and sizes of tensors, never their values.
"""
