"""Agents: who acts for users, and the tasks that they are given."""
