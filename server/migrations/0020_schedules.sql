-- Schedules of users; schedules in any time zone.

ALTER TABLE schedules
    ADD COLUMN time_zone text NOT NULL DEFAULT 'UTC' CHECK (length(time_zone) BETWEEN 1 AND 64),
    ADD COLUMN missed    text NOT NULL DEFAULT 'run_once' CHECK (missed IN ('run_once', 'skip'));
COMMENT ON TABLE schedules IS 'Cron expressions of the mesh''s own work; each tick makes one job.';

CREATE TABLE user_schedules (
    id          uuid        PRIMARY KEY,
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    kind        text        NOT NULL CHECK (length(kind) BETWEEN 1 AND 64),
    cron        text        NOT NULL CHECK (length(cron) BETWEEN 1 AND 200),
    time_zone   text        NOT NULL CHECK (length(time_zone) BETWEEN 1 AND 64),
    missed      text        NOT NULL CHECK (missed IN ('run_once', 'skip')),
    next_run_at timestamptz,
    last_run_at timestamptz,
    last_job_id uuid,
    created_at  timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE user_schedules IS 'Cron expressions of users; each tick makes one job of theirs.';
COMMENT ON COLUMN user_schedules.next_run_at IS 'NULL while the schedule is paused.';

CREATE INDEX user_schedules_by_user ON user_schedules (user_id, id);
CREATE INDEX user_schedules_due ON user_schedules (next_run_at) WHERE next_run_at IS NOT NULL;

ALTER TABLE user_schedules ENABLE ROW LEVEL SECURITY;
ALTER TABLE user_schedules FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON user_schedules TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON user_schedules TO kimberly_system USING (true);

GRANT SELECT, INSERT, DELETE, UPDATE (next_run_at, last_run_at, last_job_id)
    ON user_schedules TO kimberly_app;
GRANT SELECT, DELETE ON user_schedules TO kimberly_system;
