"""Which tokens are computed next: requests, slots, pages, steps and the interrupts between them."""
