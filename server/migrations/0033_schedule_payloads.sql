-- Schedules of users may tell their jobs something.

ALTER TABLE user_schedules
    ADD COLUMN payload jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(payload) = 'object');
COMMENT ON COLUMN user_schedules.payload IS 'What the jobs are told.';

-- The operator may pause what the mesh does of its own accord.
ALTER TABLE schedules ADD COLUMN paused boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN schedules.paused IS 'Makes no jobs, until the operator resumes it.';
