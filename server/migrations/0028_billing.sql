-- Plans as prices and rates, what is used of them, and asking for another one.

ALTER TABLE plans
    ADD COLUMN price_cents       bigint  NOT NULL DEFAULT 0 CHECK (price_cents >= 0),
    ADD COLUMN calls_per_second  integer NOT NULL DEFAULT 200 CHECK (calls_per_second >= 1),
    ADD COLUMN burst             integer NOT NULL DEFAULT 2000 CHECK (burst >= 1),
    ADD COLUMN writes_per_month  bigint  NOT NULL DEFAULT 100000 CHECK (writes_per_month >= 1),
    ADD COLUMN queries_per_month bigint  NOT NULL DEFAULT 100000 CHECK (queries_per_month >= 1),
    ADD COLUMN bytes_per_month   bigint  NOT NULL DEFAULT 1073741824 CHECK (bytes_per_month >= 1),
    ADD COLUMN jobs_per_month    bigint  NOT NULL DEFAULT 1000 CHECK (jobs_per_month >= 1);
COMMENT ON COLUMN plans.burst IS 'Calls at once after a while without; calls_per_second come back.';
COMMENT ON COLUMN plans.writes_per_month IS 'With the next three: what the audit log is told of at 80 and at 100 %.';
UPDATE plans
   SET price_cents = 900, calls_per_second = 2000, burst = 10000, writes_per_month = 2000000,
       queries_per_month = 2000000, bytes_per_month = 53687091200, jobs_per_month = 20000
 WHERE name = 'premium';

ALTER TABLE subscriptions
    ADD COLUMN requested_plan text REFERENCES plans (name),
    ADD COLUMN requested_at   timestamptz,
    ADD CHECK ((requested_plan IS NULL) = (requested_at IS NULL));
COMMENT ON COLUMN subscriptions.requested_plan IS 'Asked for, and its payment is not settled.';

CREATE TABLE usage_by_month (
    tenant_id uuid   NOT NULL,
    user_id   uuid   NOT NULL,
    month     date   NOT NULL CHECK (extract(day FROM month) = 1),
    writes    bigint NOT NULL DEFAULT 0 CHECK (writes >= 0),
    queries   bigint NOT NULL DEFAULT 0 CHECK (queries >= 0),
    bytes     bigint NOT NULL DEFAULT 0 CHECK (bytes >= 0),
    jobs      bigint NOT NULL DEFAULT 0 CHECK (jobs >= 0),
    PRIMARY KEY (user_id, tenant_id, month)
) WITH (fillfactor = 50);
COMMENT ON TABLE usage_by_month IS 'What users used. Processes count, and add what they counted every few seconds.';

ALTER TABLE usage_by_month ENABLE ROW LEVEL SECURITY;
ALTER TABLE usage_by_month FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON usage_by_month TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON usage_by_month TO kimberly_system USING (true);
GRANT SELECT ON usage_by_month TO kimberly_app;
GRANT SELECT, INSERT, UPDATE ON usage_by_month TO kimberly_system;
SELECT make_erasable('usage_by_month');
