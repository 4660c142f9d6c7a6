-- Withdrawals of consent: they end sessions, and outlive the database in S3.

ALTER TABLE sessions DROP CONSTRAINT sessions_end_reason_check;
ALTER TABLE sessions ADD CONSTRAINT sessions_end_reason_check CHECK (end_reason IN (
    'log_out', 'log_out_everywhere', 'reuse', 'revoked', 'password', 'crowded', 'disabled', 'admin',
    'consent'));

-- What was withdrawn before this is archived as soon as the code after it runs.
ALTER TABLE consents ADD COLUMN archived_at timestamptz CHECK (archived_at IS NULL OR NOT granted);
COMMENT ON COLUMN consents.archived_at IS 'When S3 took the signed word that a restored backup is corrected by. Of withdrawals alone.';
CREATE INDEX consents_unarchived ON consents (recorded_at) WHERE NOT granted AND archived_at IS NULL;
-- The decision itself stays what it is.
GRANT UPDATE (archived_at) ON consents TO kimberly_system;
