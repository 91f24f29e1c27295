"""The commands of the command line, each with its options and what it does."""
