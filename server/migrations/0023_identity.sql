-- Sessions that end in more than two ways, passwords that are changed and reset, emails that are
-- verified, and guesses that are slowed down.

ALTER TABLE sessions DROP CONSTRAINT sessions_end_reason_check;
ALTER TABLE sessions ADD CONSTRAINT sessions_end_reason_check CHECK (end_reason IN (
    'log_out', 'log_out_everywhere', 'reuse', 'revoked', 'password', 'crowded', 'disabled', 'admin'));
ALTER TABLE sessions ADD COLUMN client_name text NOT NULL DEFAULT '' CHECK (length(client_name) <= 200);
COMMENT ON COLUMN sessions.client_name IS 'The User-Agent that logged in: for its user to recognise.';

CREATE TABLE ended_grants (
    tenant_id uuid        NOT NULL,
    user_id   uuid        NOT NULL,
    id        uuid        PRIMARY KEY,
    ended_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE ended_grants IS 'Sessions and API keys that ended lately: their access tokens are refused.';
CREATE INDEX ended_grants_by_time ON ended_grants (ended_at);

ALTER TABLE users ADD COLUMN email_verified_at timestamptz;

-- No user: the log-ins of unknown emails are counted just as those of known ones.
CREATE TABLE log_in_attempts (
    subject       bytea       PRIMARY KEY CHECK (length(subject) = 32),
    failures      integer     NOT NULL CHECK (failures >= 0),
    tried_at      timestamptz NOT NULL,
    blocked_until timestamptz NOT NULL,
    known_until   timestamptz NOT NULL
);
COMMENT ON TABLE log_in_attempts IS 'Failed log-ins of an email, in all and from one place; see server/auth/throttling.py.';
COMMENT ON COLUMN log_in_attempts.subject IS 'SHA-256 of the email, and of the place if it is one place.';
COMMENT ON COLUMN log_in_attempts.known_until IS 'Until then the place is known: its user logged in from there.';
CREATE INDEX log_in_attempts_by_time ON log_in_attempts (tried_at);

-- No user: a mail is asked for alike whether or not the email names an account.
CREATE TABLE mails (
    email        text        NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    kind         text        NOT NULL CHECK (kind IN ('password_reset', 'email_verification', 'invitation')),
    about        text        NOT NULL DEFAULT '',
    requested_at timestamptz NOT NULL,
    due_at       timestamptz NOT NULL,
    attempts     integer     NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    sent_at      timestamptz,
    PRIMARY KEY (email, kind, about)
);
COMMENT ON TABLE mails IS 'The outbox. Tokens are made when a mail is sent: none is stored in clear.';
CREATE INDEX mails_due ON mails (due_at) WHERE sent_at IS NULL;

CREATE TABLE mailed_tokens (
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    hash       bytea       PRIMARY KEY CHECK (length(hash) = 32),
    kind       text        NOT NULL CHECK (kind IN ('password_reset', 'email_verification')),
    email      text        NOT NULL,
    expires_at timestamptz NOT NULL
);
COMMENT ON TABLE mailed_tokens IS 'What whoever reads a user''s mail may do once.';
COMMENT ON COLUMN mailed_tokens.hash IS 'SHA-256. The token itself is in the mail alone.';
CREATE INDEX mailed_tokens_by_user ON mailed_tokens (user_id);

ALTER TABLE ended_grants    ENABLE ROW LEVEL SECURITY;
ALTER TABLE ended_grants    FORCE  ROW LEVEL SECURITY;
ALTER TABLE log_in_attempts ENABLE ROW LEVEL SECURITY;
ALTER TABLE log_in_attempts FORCE  ROW LEVEL SECURITY;
ALTER TABLE mails           ENABLE ROW LEVEL SECURITY;
ALTER TABLE mails           FORCE  ROW LEVEL SECURITY;
ALTER TABLE mailed_tokens   ENABLE ROW LEVEL SECURITY;
ALTER TABLE mailed_tokens   FORCE  ROW LEVEL SECURITY;
CREATE POLICY system ON ended_grants    TO kimberly_system USING (true);
CREATE POLICY system ON log_in_attempts TO kimberly_system USING (true);
CREATE POLICY system ON mails           TO kimberly_system USING (true);
CREATE POLICY system ON mailed_tokens   TO kimberly_system USING (true);

GRANT SELECT, INSERT, DELETE         ON ended_grants    TO kimberly_system;
GRANT SELECT, INSERT, UPDATE, DELETE ON log_in_attempts TO kimberly_system;
GRANT SELECT, INSERT, UPDATE, DELETE ON mails           TO kimberly_system;
GRANT SELECT, INSERT, DELETE         ON mailed_tokens   TO kimberly_system;
GRANT UPDATE (email_verified_at)     ON users           TO kimberly_system;
