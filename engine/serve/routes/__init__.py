"""The endpoints, one file for each family; each makes a router over one Serving."""
