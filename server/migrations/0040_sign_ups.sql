-- Who signed up and has not shown that the email is theirs.

-- No user: a sign-up is kept alike whether or not the email names an account.
CREATE TABLE sign_ups (
    id            uuid        PRIMARY KEY,
    email         text        NOT NULL CHECK (length(email) BETWEEN 3 AND 254),
    display_name  text        NOT NULL CHECK (length(display_name) BETWEEN 1 AND 100),
    password_hash text        NOT NULL CHECK (password_hash LIKE '$argon2id$%'),
    token_hash    bytea       UNIQUE CHECK (length(token_hash) = 32),
    requested_at  timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL CHECK (expires_at > requested_at)
);
COMMENT ON TABLE sign_ups IS 'What becomes an account when its mailed token comes back.';
COMMENT ON COLUMN sign_ups.token_hash IS 'SHA-256 of the token in the mail; none before it is sent, or if the email has an account.';
CREATE INDEX sign_ups_by_email ON sign_ups (email, requested_at);
CREATE INDEX sign_ups_by_time ON sign_ups (expires_at);

ALTER TABLE mails DROP CONSTRAINT mails_kind_check;
ALTER TABLE mails ADD CONSTRAINT mails_kind_check CHECK (
    kind IN ('password_reset', 'email_verification', 'invitation', 'sign_up'));

ALTER TABLE sign_ups ENABLE ROW LEVEL SECURITY;
ALTER TABLE sign_ups FORCE  ROW LEVEL SECURITY;
CREATE POLICY system ON sign_ups TO kimberly_system USING (true);
GRANT SELECT, INSERT, DELETE ON sign_ups TO kimberly_system;
GRANT UPDATE (token_hash)    ON sign_ups TO kimberly_system;
