"""Plans, what users use of them, and how fast they may."""
