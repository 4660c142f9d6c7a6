"""Backups: a dump of the database and every object that it names, sealed, in a bucket apart."""
