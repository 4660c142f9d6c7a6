-- Who proved a password that was changed meanwhile is not let in with it.

ALTER TABLE accounts ADD COLUMN password_changes integer NOT NULL DEFAULT 0;
COMMENT ON COLUMN accounts.password_changes IS 'How often another password was set. The same one under another hash does not count.';
