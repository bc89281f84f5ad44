"""Tiny models whose logits llama.cpp has computed; models.py lists them."""
