-- The keys that users' sensitive content is encrypted with.

ALTER TABLE consents DROP CONSTRAINT consents_purpose_check;
ALTER TABLE consents ADD CONSTRAINT consents_purpose_check
    CHECK (purpose IN ('memory.store', 'memory.embed', 'memory.sensitive'));

CREATE TABLE user_keys (
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    id          uuid        NOT NULL UNIQUE,
    wrapped     bytea       NOT NULL CHECK (length(wrapped) BETWEEN 1 AND 1024),
    kms_version text        NOT NULL CHECK (length(kms_version) BETWEEN 1 AND 128),
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, tenant_id)
);
COMMENT ON TABLE user_keys IS 'Each user''s data key, wrapped by the key manager. Deleting a row shreds what it sealed.';
COMMENT ON COLUMN user_keys.id IS 'Another key has another id: what a process keeps of a shredded one fits no row.';
COMMENT ON COLUMN user_keys.kms_version IS 'Which master key wrapped it: a rotation looks for those that are not the newest.';

ALTER TABLE user_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE user_keys FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON user_keys TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON user_keys TO kimberly_system USING (true);

-- A key is made by its user, wrapped anew by maintenance, and destroyed by an erasure.
GRANT SELECT, INSERT ON user_keys TO kimberly_app;
GRANT SELECT, DELETE ON user_keys TO kimberly_system;
GRANT UPDATE (wrapped, kms_version) ON user_keys TO kimberly_system;
