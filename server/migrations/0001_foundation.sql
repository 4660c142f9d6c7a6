-- Tenancy, consent, audit, idempotency: what every slice builds on.

-- The caller of the running transaction. Unset means NULL, and NULL equals nothing: no rows.
CREATE FUNCTION current_tenant() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
    RETURN nullif(current_setting('kimberly.tenant_id', true), '')::uuid;

CREATE FUNCTION current_user_id() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
    RETURN nullif(current_setting('kimberly.user_id', true), '')::uuid;

-- Enters a user for the rest of the transaction. A reading statement that is a transaction of its
-- own starts FROM it, which saves the round trips of BEGIN, SET and COMMIT.
CREATE FUNCTION enter(INOUT tenant_id uuid, INOUT user_id uuid) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM set_config('kimberly.tenant_id', tenant_id::text, true),
            set_config('kimberly.user_id', user_id::text, true);
END
$$;

CREATE TABLE consents (
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    purpose     text        NOT NULL CHECK (purpose IN ('memory.store')),
    version     bigint      NOT NULL CHECK (version >= 1),
    granted     boolean     NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, user_id, purpose, version)
);
COMMENT ON TABLE consents IS 'Every decision of a user on a purpose; the highest version stands.';

-- Whether the last word of the running transaction's user on a purpose was yes.
CREATE FUNCTION consented(asked text) RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce((SELECT granted
                       FROM consents
                      WHERE tenant_id = current_tenant() AND user_id = current_user_id()
                        AND purpose = asked
                      ORDER BY version DESC
                      LIMIT 1), false);

CREATE TABLE audit_events (
    id         uuid        PRIMARY KEY,
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    actor      text        NOT NULL,
    action     text        NOT NULL,
    resource   text        NOT NULL,
    event_time timestamptz NOT NULL DEFAULT now(),
    xid        xid8        NOT NULL DEFAULT pg_current_xact_id()
);
COMMENT ON TABLE audit_events IS 'What was done, by whom, to what; written in the transaction that did it. No memory text.';
COMMENT ON COLUMN audit_events.user_id IS 'Whose data was touched.';
COMMENT ON COLUMN audit_events.xid IS 'Orders the chain: transactions below the snapshot''s xmin can add no more events.';
CREATE INDEX audit_events_by_user ON audit_events (tenant_id, user_id, id);
CREATE INDEX audit_events_by_xid ON audit_events (xid, id);

CREATE TABLE requests (
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    method      text        NOT NULL,
    request_id  text        NOT NULL CHECK (length(request_id) BETWEEN 1 AND 64),
    fingerprint bytea       NOT NULL,
    resource_id uuid        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, user_id, method, request_id)
);
COMMENT ON TABLE requests IS 'Which resource a request_id made, so that a retry makes no second one.';

-- Row-level security repeats what every statement says: one tenant, one user.
ALTER TABLE consents     ENABLE ROW LEVEL SECURITY;
ALTER TABLE consents     FORCE  ROW LEVEL SECURITY;
ALTER TABLE audit_events ENABLE ROW LEVEL SECURITY;
ALTER TABLE audit_events FORCE  ROW LEVEL SECURITY;
ALTER TABLE requests     ENABLE ROW LEVEL SECURITY;
ALTER TABLE requests     FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON consents TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON audit_events TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON requests TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON consents     TO kimberly_system USING (true);
CREATE POLICY system ON audit_events TO kimberly_system USING (true);

-- Audit and consent are history: nobody but the owner can change or remove a row.
GRANT SELECT, INSERT ON consents, audit_events, requests TO kimberly_app;
GRANT UPDATE (resource_id) ON requests TO kimberly_app;
GRANT SELECT, INSERT ON consents, audit_events TO kimberly_system;
