-- Copies of everything that is kept of a user, for them to take along.

CREATE TABLE exports (
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    id          uuid        NOT NULL,
    job_id      uuid        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    expires_at  timestamptz CHECK (expires_at > finished_at),
    version_id  text        CHECK (length(version_id) BETWEEN 1 AND 1024),
    size_bytes  bigint      CHECK (size_bytes > 0),
    sha256      bytea       CHECK (length(sha256) = 32),
    PRIMARY KEY (user_id, id),
    CHECK ((finished_at IS NULL) = (expires_at IS NULL)),
    CHECK ((finished_at IS NULL) = (size_bytes IS NULL)),
    CHECK ((finished_at IS NULL) = (sha256 IS NULL))
);
COMMENT ON TABLE exports IS 'Archives for users; the bytes are in S3 under tenant/user/id.';
COMMENT ON COLUMN exports.version_id IS 'The version of the object that was written; NULL: the bucket keeps none, or nothing was written.';
COMMENT ON COLUMN exports.job_id IS 'The job that writes it; a job may be forgotten before its export.';

ALTER TABLE exports ENABLE ROW LEVEL SECURITY;
ALTER TABLE exports FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON exports TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON exports TO kimberly_system USING (true);

GRANT SELECT, DELETE ON exports TO kimberly_app;
GRANT INSERT (tenant_id, user_id, id, job_id) ON exports TO kimberly_app;
GRANT UPDATE (finished_at, expires_at, version_id, size_bytes, sha256) ON exports TO kimberly_app;
-- The sweep of the object store looks up which archives are somebody's.
GRANT SELECT ON exports TO kimberly_system;
SELECT make_erasable('exports');
