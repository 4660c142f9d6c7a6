"""The figures of the README, each a command that anyone can repeat."""
