"""Programs for developers: measurements, synthetic models, support tables."""
