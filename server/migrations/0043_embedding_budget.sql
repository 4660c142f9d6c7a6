-- What a local model may do for a user in a month.

ALTER TABLE plans
    ADD COLUMN embeddings_per_month bigint NOT NULL DEFAULT 100000 CHECK (embeddings_per_month >= 0);
COMMENT ON COLUMN plans.embeddings_per_month IS 'How many vectors a local model makes at most; what else is meant for a month bounds nothing.';
UPDATE plans SET embeddings_per_month = 2000000 WHERE name = 'premium';

ALTER TABLE usage_by_month ADD COLUMN embeddings bigint NOT NULL DEFAULT 0 CHECK (embeddings >= 0);
COMMENT ON COLUMN usage_by_month.embeddings IS 'Vectors that a local model made, counted in the transactions that keep them.';
-- Those are the user's. What they would do to the other columns is not granted.
GRANT INSERT (tenant_id, user_id, month, embeddings), UPDATE (embeddings)
   ON usage_by_month TO kimberly_app;

-- The month that usage counts in now.
CREATE FUNCTION this_month() RETURNS date LANGUAGE sql STABLE
RETURN date_trunc('month', now() AT TIME ZONE 'UTC')::date;

-- How many more vectors a local model may make for a user this month, never less than 0.
CREATE FUNCTION embeddings_left(whose_tenant uuid, whose uuid) RETURNS bigint
LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT greatest(plan.embeddings_per_month
                    - coalesce((SELECT used.embeddings
                                  FROM usage_by_month AS used
                                 WHERE used.tenant_id = whose_tenant AND used.user_id = whose
                                   AND used.month = this_month()), 0), 0)
      FROM plans AS plan
     WHERE plan.name = coalesce((SELECT subscription.plan
                                   FROM subscriptions AS subscription
                                  WHERE subscription.tenant_id = whose_tenant
                                    AND subscription.user_id = whose), 'free');
END;
