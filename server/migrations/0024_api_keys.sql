-- Keys for scripts and agents: good for less than a log-in, and for a time.

CREATE TABLE api_keys (
    tenant_id    uuid        NOT NULL,
    user_id      uuid        NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    id           uuid        PRIMARY KEY,
    name         text        NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    prefix       text        NOT NULL,
    scopes       text[]      NOT NULL CHECK (cardinality(scopes) >= 1),
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz NOT NULL CHECK (expires_at > created_at),
    last_used_at timestamptz,
    revoked_at   timestamptz
);
COMMENT ON TABLE api_keys IS 'What a user gave to a script; exchanged for access tokens of some scopes.';
COMMENT ON COLUMN api_keys.prefix IS 'How the newest secret begins, for its user to tell keys apart.';
COMMENT ON COLUMN api_keys.last_used_at IS 'To the minute: a key in steady use is no hot row.';
CREATE INDEX api_keys_by_user ON api_keys (user_id, id) WHERE revoked_at IS NULL;

CREATE TABLE api_key_secrets (
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    hash       bytea       PRIMARY KEY CHECK (length(hash) = 32),
    key_id     uuid        NOT NULL REFERENCES api_keys (id) ON DELETE CASCADE,
    grant_id   uuid        NOT NULL UNIQUE,
    expires_at timestamptz NOT NULL
);
COMMENT ON TABLE api_key_secrets IS 'What opens a key: one secret, or two while it is being rotated.';
COMMENT ON COLUMN api_key_secrets.hash IS 'SHA-256. The secret itself is shown once, when it is made.';
COMMENT ON COLUMN api_key_secrets.grant_id IS 'The claim sid of the access tokens made with this secret.';
CREATE INDEX api_key_secrets_by_key ON api_key_secrets (key_id);

ALTER TABLE api_keys        ENABLE ROW LEVEL SECURITY;
ALTER TABLE api_keys        FORCE  ROW LEVEL SECURITY;
ALTER TABLE api_key_secrets ENABLE ROW LEVEL SECURITY;
ALTER TABLE api_key_secrets FORCE  ROW LEVEL SECURITY;
CREATE POLICY system ON api_keys        TO kimberly_system USING (true);
CREATE POLICY system ON api_key_secrets TO kimberly_system USING (true);

GRANT SELECT, INSERT, DELETE ON api_keys TO kimberly_system;
GRANT UPDATE (prefix, last_used_at, revoked_at) ON api_keys TO kimberly_system;
GRANT SELECT, INSERT, DELETE ON api_key_secrets TO kimberly_system;
GRANT UPDATE (expires_at) ON api_key_secrets TO kimberly_system;
