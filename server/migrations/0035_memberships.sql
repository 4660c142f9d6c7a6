-- An account in several tenants: in each it is another user, and every row of a user's stays what it
-- is. One of them is the home: it has the email and the password, and the others refer to it.

-- Rather fail, and be run again, than hold up whoever logs in.
SET LOCAL lock_timeout = '5s';

ALTER TABLE users ADD COLUMN home_id uuid;
COMMENT ON COLUMN users.home_id IS 'The user that the account is at home, where it logs in; none: this one.';
ALTER TABLE users ALTER COLUMN email DROP NOT NULL;
COMMENT ON COLUMN users.email IS 'Normalised: lower case, Unicode NFC. None: that of the home.';
-- Validated by the next migration, which holds up nobody.
ALTER TABLE users ADD CONSTRAINT users_home FOREIGN KEY (home_id) REFERENCES users (id) NOT VALID;
ALTER TABLE users ADD CONSTRAINT users_email_is_the_homes
    CHECK ((email IS NULL) = (home_id IS NOT NULL)) NOT VALID;
CREATE UNIQUE INDEX users_by_home ON users (home_id, tenant_id) WHERE home_id IS NOT NULL;

-- What an account is called is the same in all its tenants. A view of the owner, which sees nothing
-- but that: the application's own role sees the user of the transaction alone.
CREATE POLICY home ON users FOR SELECT TO CURRENT_USER USING (true);
CREATE VIEW own_home WITH (security_barrier) AS
    SELECT home.email
      FROM users
      JOIN users AS home ON home.id = users.home_id
     WHERE users.tenant_id = current_tenant() AND users.id = current_user_id();
COMMENT ON VIEW own_home IS 'The home of the transaction''s user, if that is another one.';
GRANT SELECT ON own_home TO kimberly_app;

ALTER TABLE sessions ADD COLUMN switched_from uuid;
COMMENT ON COLUMN sessions.switched_from IS 'The session, of another tenant, that it was begun from and ends with; none: a log-in.';
CREATE INDEX sessions_by_origin ON sessions (switched_from) WHERE switched_from IS NOT NULL;

ALTER TABLE erasures ADD COLUMN begun_with uuid;
COMMENT ON COLUMN erasures.begun_with IS 'The erasure of the account, if it began with that.';
CREATE INDEX erasures_by_account ON erasures (begun_with) WHERE begun_with IS NOT NULL;
