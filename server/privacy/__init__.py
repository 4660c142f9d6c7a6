"""What is kept about a user as a whole: a copy of it, and its end."""
