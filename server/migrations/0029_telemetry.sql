-- What metrics read every half minute, without reading all there is; and whose trace a job goes on.

CREATE INDEX meditations_of_all ON meditations (id) WHERE user_id IS NULL;
CREATE INDEX jobs_dead ON jobs (kind) WHERE state = 'dead';
-- Rows come in the order of months.
CREATE INDEX usage_by_month_in_order ON usage_by_month USING brin (month);

ALTER TABLE jobs ADD COLUMN trace text CHECK (length(trace) = 55);
COMMENT ON COLUMN jobs.trace IS 'W3C traceparent of the call that asked for it, if that is traced.';
GRANT INSERT (trace) ON jobs TO kimberly_app;
