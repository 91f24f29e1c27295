"""A step as data: traced, sorted by what depends on the carry, evaluated."""
