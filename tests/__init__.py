"""Tests, in folders like the code; what they share is in tests.support."""
