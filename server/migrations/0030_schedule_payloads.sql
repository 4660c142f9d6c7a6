-- Schedules of users may tell their jobs something.

ALTER TABLE user_schedules
    ADD COLUMN payload jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(payload) = 'object');
COMMENT ON COLUMN user_schedules.payload IS 'What the jobs are told.';
