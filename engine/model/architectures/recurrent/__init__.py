"""Families in which all or most layers have a state instead of attention."""
