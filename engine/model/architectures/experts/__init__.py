"""Families that are, or became, mixtures of experts."""
