-- What became of backups: made, verified, restored from.

CREATE TABLE backup_runs (
    id          uuid        PRIMARY KEY,
    kind        text        NOT NULL CHECK (kind IN ('create', 'verify')),
    backup      text        CHECK (length(backup) BETWEEN 1 AND 64),
    started_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    outcome     text        CHECK (outcome IN ('succeeded', 'failed', 'lost')),
    bytes       bigint      CHECK (bytes >= 0),
    digest      bytea       CHECK (length(digest) = 32),
    report      jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(report) = 'object'),
    CHECK ((finished_at IS NULL) = (outcome IS NULL))
);
COMMENT ON TABLE backup_runs IS 'Runs that made a backup or verified one. No memory text.';
COMMENT ON COLUMN backup_runs.backup IS 'Which backup, as it is named in its bucket; NULL: there was none to verify.';
COMMENT ON COLUMN backup_runs.outcome IS 'NULL: it runs. lost: its process ended without a word.';
COMMENT ON COLUMN backup_runs.digest IS 'SHA-256 of the manifest.';
CREATE INDEX backup_runs_by_kind ON backup_runs (kind, id);

ALTER TABLE backup_runs ENABLE ROW LEVEL SECURITY;
ALTER TABLE backup_runs FORCE  ROW LEVEL SECURITY;
CREATE POLICY system ON backup_runs TO kimberly_system USING (true);
GRANT SELECT, INSERT, UPDATE ON backup_runs TO kimberly_system;
