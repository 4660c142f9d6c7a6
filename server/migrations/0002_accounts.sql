-- Accounts, sessions, signing keys, and the hash chain of the audit log.

CREATE TABLE tenants (
    id         uuid        PRIMARY KEY,
    created_at timestamptz NOT NULL
);
COMMENT ON TABLE tenants IS 'Whom data belongs to. Signing up makes a personal one.';

CREATE TABLE users (
    tenant_id    uuid        NOT NULL REFERENCES tenants (id),
    id           uuid        PRIMARY KEY,
    email        text        NOT NULL UNIQUE CHECK (length(email) BETWEEN 3 AND 254),
    display_name text        NOT NULL CHECK (length(display_name) BETWEEN 1 AND 100),
    created_at   timestamptz NOT NULL
);
COMMENT ON COLUMN users.email IS 'Normalised: lower case, Unicode NFC.';
CREATE INDEX users_by_tenant ON users (tenant_id);

-- Apart from users, so that no statement about a user can ever return a password hash.
CREATE TABLE accounts (
    tenant_id     uuid NOT NULL,
    user_id       uuid PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    password_hash text NOT NULL CHECK (password_hash LIKE '$argon2id$%')
);
COMMENT ON COLUMN accounts.password_hash IS 'With its parameters and salt, as Argon2 writes it.';

CREATE TABLE sessions (
    tenant_id       uuid        NOT NULL,
    user_id         uuid        NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    id              uuid        PRIMARY KEY,
    started_at      timestamptz NOT NULL,
    expires_at      timestamptz NOT NULL CHECK (expires_at > started_at),
    used_generation integer     NOT NULL DEFAULT 0 CHECK (used_generation >= 0),
    used_at         timestamptz,
    repeats         integer     NOT NULL DEFAULT 0 CHECK (repeats >= 0),
    ended_at        timestamptz,
    end_reason      text        CHECK (end_reason IN ('log_out', 'reuse')),
    CHECK ((ended_at IS NULL) = (end_reason IS NULL)),
    CHECK ((used_at IS NULL) = (used_generation = 0))
);
COMMENT ON TABLE sessions IS 'A log-in and the family of refresh tokens that descends from it.';
COMMENT ON COLUMN sessions.used_generation IS 'The newest generation of which a token was used.';
COMMENT ON COLUMN sessions.used_at IS 'When the first token of that generation was used.';
COMMENT ON COLUMN sessions.repeats IS 'How often that generation was used again, by double clicks.';
CREATE INDEX sessions_by_user ON sessions (user_id, expires_at);

CREATE TABLE refresh_tokens (
    hash       bytea   PRIMARY KEY CHECK (length(hash) = 32),
    session_id uuid    NOT NULL REFERENCES sessions (id) ON DELETE CASCADE,
    generation integer NOT NULL CHECK (generation >= 1)
);
COMMENT ON COLUMN refresh_tokens.hash IS 'SHA-256. The token itself is nowhere but with its client.';
CREATE INDEX refresh_tokens_by_session ON refresh_tokens (session_id);

CREATE TABLE signing_keys (
    kid                 text        PRIMARY KEY,
    public_jwk          jsonb       NOT NULL,
    wrapped_private_key bytea,
    published_at        timestamptz NOT NULL,
    signs_from          timestamptz NOT NULL CHECK (signs_from >= published_at),
    withdrawn_at        timestamptz,
    CHECK ((wrapped_private_key IS NULL) = (withdrawn_at IS NOT NULL))
);
COMMENT ON TABLE signing_keys IS 'Sign access tokens. Withdrawing a key destroys its private half.';
COMMENT ON COLUMN signing_keys.signs_from IS 'The key signs until the next one''s signs_from.';

-- No foreign key to the events: a link that outlives its event bears witness of the deletion.
CREATE TABLE audit_links (
    tenant_id uuid   NOT NULL,
    position  bigint NOT NULL CHECK (position >= 1),
    event_id  uuid   NOT NULL UNIQUE,
    hash      bytea  NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (tenant_id, position)
);
COMMENT ON TABLE audit_links IS 'Each tenant''s audit events as a hash chain; see server/users/chain.py.';

CREATE TABLE audit_heads (
    tenant_id uuid   PRIMARY KEY,
    position  bigint NOT NULL CHECK (position >= 1),
    hash      bytea  NOT NULL CHECK (length(hash) = 32)
);
COMMENT ON TABLE audit_heads IS 'Where each tenant''s chain ends, so that a missing end is seen.';

CREATE TABLE audit_cursor (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    xid       xid8    NOT NULL,
    event_id  uuid    NOT NULL
);
COMMENT ON TABLE audit_cursor IS 'The last event that was chained, in the order of (xid, id).';
INSERT INTO audit_cursor (xid, event_id) VALUES ('0', '00000000-0000-0000-0000-000000000000');

ALTER TABLE tenants        ENABLE ROW LEVEL SECURITY;
ALTER TABLE tenants        FORCE  ROW LEVEL SECURITY;
ALTER TABLE users          ENABLE ROW LEVEL SECURITY;
ALTER TABLE users          FORCE  ROW LEVEL SECURITY;
ALTER TABLE accounts       ENABLE ROW LEVEL SECURITY;
ALTER TABLE accounts       FORCE  ROW LEVEL SECURITY;
ALTER TABLE sessions       ENABLE ROW LEVEL SECURITY;
ALTER TABLE sessions       FORCE  ROW LEVEL SECURITY;
ALTER TABLE refresh_tokens ENABLE ROW LEVEL SECURITY;
ALTER TABLE refresh_tokens FORCE  ROW LEVEL SECURITY;
ALTER TABLE audit_links    ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_links    FORCE  ROW LEVEL SECURITY;
ALTER TABLE audit_heads    ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_heads    FORCE  ROW LEVEL SECURITY;

-- Nobody is logged in before they log in: accounts and sessions are the system role's alone.
CREATE POLICY system ON tenants        TO kimberly_system USING (true);
CREATE POLICY system ON users          TO kimberly_system USING (true);
CREATE POLICY system ON accounts       TO kimberly_system USING (true);
CREATE POLICY system ON sessions       TO kimberly_system USING (true);
CREATE POLICY system ON refresh_tokens TO kimberly_system USING (true);
CREATE POLICY system ON audit_links    TO kimberly_system USING (true);
CREATE POLICY system ON audit_heads    TO kimberly_system USING (true);
CREATE POLICY own ON users TO kimberly_app
    USING (tenant_id = current_tenant() AND id = current_user_id());
CREATE POLICY own ON audit_links TO kimberly_app
    USING (tenant_id = current_tenant());

GRANT SELECT, INSERT         ON tenants, users              TO kimberly_system;
GRANT SELECT, INSERT, UPDATE ON accounts                    TO kimberly_system;
GRANT SELECT, INSERT, UPDATE, DELETE ON sessions            TO kimberly_system;
GRANT SELECT, INSERT         ON refresh_tokens              TO kimberly_system;
GRANT SELECT, INSERT         ON signing_keys                TO kimberly_system;
GRANT UPDATE (wrapped_private_key, withdrawn_at) ON signing_keys TO kimberly_system;
GRANT SELECT, INSERT         ON audit_links                 TO kimberly_system;
GRANT SELECT, INSERT, UPDATE ON audit_heads                 TO kimberly_system;
GRANT SELECT, UPDATE         ON audit_cursor                TO kimberly_system;
GRANT SELECT                 ON users, audit_links          TO kimberly_app;

-- Time and place in the log are the database's to say: an event cannot be dated back.
REVOKE INSERT ON audit_events FROM kimberly_app, kimberly_system;
GRANT INSERT (id, tenant_id, user_id, actor, action, resource) ON audit_events
    TO kimberly_app, kimberly_system;
