"""A user's own account: profile, consents, audit log."""
