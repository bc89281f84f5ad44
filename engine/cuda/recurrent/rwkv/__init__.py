"""RWKV on the GPU: the shift of tokens, time mixing of versions 6 and 7, each kernel file beside its launcher."""
