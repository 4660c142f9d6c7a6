-- Users choose what they are called.

ALTER TABLE users ADD COLUMN version bigint NOT NULL DEFAULT 1 CHECK (version >= 1);
COMMENT ON COLUMN users.version IS 'Counts the changes of what the user chose about themselves.';
GRANT UPDATE (display_name, version) ON users TO kimberly_app;

-- Agents stay as long as their users do, so that whoever reads the log can be told a name.
CREATE FUNCTION agent_of(actor text) RETURNS uuid
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN actor ~ '^agt_[0-9a-f]{32}$' THEN substr(actor, 5)::uuid END;
COMMENT ON FUNCTION agent_of IS 'The agent that an actor of the audit log is; null if it is none.';
