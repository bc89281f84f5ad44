"""Families of several generations, whose layers differ: from dense parts to experts, latent attention or states."""
