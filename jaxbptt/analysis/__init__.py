"""What happened to the gradient on its way back."""
