"""Memories: three tiers, retrieval, attachments, meditation."""
