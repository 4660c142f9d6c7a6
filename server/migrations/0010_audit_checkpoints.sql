-- Signed checkpoints of the audit log; the checkpoints themselves are objects in S3.

CREATE TABLE audit_keys (
    key_id              text        PRIMARY KEY CHECK (length(key_id) BETWEEN 1 AND 100),
    wrapped_private_key bytea       NOT NULL,
    created_at          timestamptz NOT NULL
);
COMMENT ON TABLE audit_keys IS 'Sign checkpoints of the audit log: the newest one does, the others did. None is ever removed.';
COMMENT ON COLUMN audit_keys.key_id IS 'Thumbprint of the public key (RFC 7638).';
COMMENT ON COLUMN audit_keys.wrapped_private_key IS 'Also says the public key: one that stood here in the clear could be swapped.';

CREATE TABLE audit_checkpoints (
    tenant_id uuid        PRIMARY KEY,
    position  bigint      NOT NULL CHECK (position >= 1),
    key_id    text        NOT NULL,
    signed_at timestamptz NOT NULL
);
COMMENT ON TABLE audit_checkpoints IS 'The newest checkpoint of each tenant that S3 has taken: whether a head moved since, and what must be there.';

ALTER TABLE audit_checkpoints ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_checkpoints FORCE  ROW LEVEL SECURITY;
CREATE POLICY system ON audit_checkpoints TO kimberly_system USING (true);

GRANT SELECT, INSERT         ON audit_keys        TO kimberly_system;
GRANT UPDATE (wrapped_private_key) ON audit_keys     TO kimberly_system;
GRANT SELECT, INSERT, UPDATE ON audit_checkpoints TO kimberly_system;
