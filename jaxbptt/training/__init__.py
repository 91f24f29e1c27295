"""What training adds to a gradient: losses over time."""
