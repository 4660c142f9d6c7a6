-- Tenants of several people: roles, invitations, and people who may not log in for a while.

ALTER TABLE users ADD COLUMN role text NOT NULL DEFAULT 'owner'
    CHECK (role IN ('owner', 'admin', 'member', 'auditor'));
ALTER TABLE users ADD COLUMN disabled_at timestamptz;
COMMENT ON COLUMN users.role IS 'What the user may do in their tenant; whoever signs up by themselves owns one.';
COMMENT ON COLUMN users.disabled_at IS 'Since when the user may not log in. Nothing of theirs is deleted.';
DROP INDEX users_by_tenant;
CREATE INDEX users_by_tenant ON users (tenant_id, id);

CREATE TABLE invitations (
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    id          uuid        PRIMARY KEY,
    email       text        NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    role        text        NOT NULL CHECK (role IN ('admin', 'member', 'auditor')),
    token_hash  bytea       UNIQUE CHECK (length(token_hash) = 32),
    created_at  timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL CHECK (expires_at > created_at),
    accepted_at timestamptz,
    revoked_at  timestamptz
);
COMMENT ON TABLE invitations IS 'Who was asked to join a tenant, and by whom.';
COMMENT ON COLUMN invitations.user_id IS 'Who invites.';
COMMENT ON COLUMN invitations.token_hash IS 'SHA-256 of the token in the mail; none before it is sent.';
CREATE UNIQUE INDEX invitations_open ON invitations (tenant_id, email)
    WHERE accepted_at IS NULL AND revoked_at IS NULL;

ALTER TABLE invitations ENABLE ROW LEVEL SECURITY;
ALTER TABLE invitations FORCE  ROW LEVEL SECURITY;
CREATE POLICY system ON invitations TO kimberly_system USING (true);

GRANT SELECT, INSERT, DELETE ON invitations TO kimberly_system;
GRANT UPDATE (token_hash, accepted_at, revoked_at) ON invitations TO kimberly_system;
GRANT UPDATE (grant_id) ON api_key_secrets TO kimberly_system;
GRANT UPDATE (role, disabled_at) ON users TO kimberly_system;
