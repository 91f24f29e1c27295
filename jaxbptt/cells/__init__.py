"""What one time step computes: the contracts, the built-in cells, and their combination."""
