"""Which tokens are computed next: requests, slots, pages, steps, and recovery after exceptions between them."""
