-- How fast all users of a tenant may call together.

ALTER TABLE plans
    ADD COLUMN tenant_calls_per_second integer NOT NULL DEFAULT 2000
        CHECK (tenant_calls_per_second >= 1),
    ADD COLUMN tenant_burst integer NOT NULL DEFAULT 20000 CHECK (tenant_burst >= 1);
COMMENT ON COLUMN plans.tenant_calls_per_second IS 'With the next: of all users of a tenant in which somebody has the plan, the largest of these counts.';
UPDATE plans SET tenant_calls_per_second = 20000, tenant_burst = 100000 WHERE name = 'premium';

CREATE INDEX subscriptions_by_tenant ON subscriptions (tenant_id);
