"""How a step is unrolled and how the gradient comes back: one strategy a module, one signature for all."""
