r"""The classic mistakes of a hand-written backward pass, each run on the user's own problem, to be told by its gradient."""
