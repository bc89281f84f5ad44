"""Recurrent layers on the device: causal convolutions and scans over a state, and their launchers."""
