"""What tests share: models made in memory, plain references, GPU helpers."""
