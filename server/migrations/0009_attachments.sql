-- Attachments in parts, transcripts, and objects that must go whatever crashes.

ALTER TABLE attachments
    ADD COLUMN upload_id  text CHECK (length(upload_id) BETWEEN 1 AND 1024),
    ADD COLUMN version_id text CHECK (length(version_id) BETWEEN 1 AND 1024),
    DROP CONSTRAINT attachments_size_bytes_check,
    ADD CONSTRAINT attachments_size_bytes_check CHECK (size_bytes BETWEEN 1 AND 104857600);
COMMENT ON COLUMN attachments.upload_id IS 'Of an upload in parts, as the object store names it.';
COMMENT ON COLUMN attachments.version_id IS 'The version of the object that was checked; NULL: the bucket keeps none, or nothing was checked.';
CREATE INDEX attachments_pending ON attachments (created_at) WHERE state = 'pending';

CREATE TABLE transcripts (
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    session_id text        NOT NULL CHECK (length(session_id) BETWEEN 1 AND 128),
    id         uuid        NOT NULL,
    version_id text        CHECK (length(version_id) BETWEEN 1 AND 1024),
    size_bytes bigint      NOT NULL CHECK (size_bytes >= 0),
    sha256     bytea       NOT NULL CHECK (length(sha256) = 32),
    turns      integer     NOT NULL CHECK (turns >= 0),
    created_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, session_id),
    UNIQUE (user_id, id)
);
COMMENT ON TABLE transcripts IS 'What was said in a conversation; the bytes are in S3 under tenant/user/id.';
COMMENT ON COLUMN transcripts.id IS 'Names the object: a transcript that is written again gets another one.';

CREATE TABLE doomed_objects (
    object_key text        PRIMARY KEY CHECK (length(object_key) BETWEEN 1 AND 1024),
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE doomed_objects IS 'Objects whose rows are deleted; a row goes when every version of its object is gone.';

ALTER TABLE transcripts    ENABLE ROW LEVEL SECURITY;
ALTER TABLE transcripts    FORCE  ROW LEVEL SECURITY;
ALTER TABLE doomed_objects ENABLE ROW LEVEL SECURITY;
ALTER TABLE doomed_objects FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON transcripts TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON doomed_objects TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON attachments    TO kimberly_system USING (true);
CREATE POLICY system ON transcripts    TO kimberly_system USING (true);
CREATE POLICY system ON doomed_objects TO kimberly_system USING (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON transcripts TO kimberly_app;
GRANT SELECT, INSERT, DELETE ON doomed_objects TO kimberly_app;
-- The sweep deletes what was never uploaded and looks up whose the objects are.
GRANT SELECT, DELETE ON attachments TO kimberly_system;
GRANT SELECT ON transcripts TO kimberly_system;
GRANT SELECT, INSERT, DELETE ON doomed_objects TO kimberly_system;
