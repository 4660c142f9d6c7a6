-- Agents: who acts for a user with a key of their own, and what the database itself has of them.

ALTER TABLE consents DROP CONSTRAINT consents_purpose_check;
ALTER TABLE consents ADD CONSTRAINT consents_purpose_check CHECK (
    purpose IN ('memory.store', 'memory.embed', 'memory.sensitive', 'memory.agent_access'));

CREATE TABLE agents (
    tenant_id   uuid        NOT NULL,
    user_id     uuid        NOT NULL,
    id          uuid        PRIMARY KEY,
    name        text        NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    kind        text        NOT NULL CHECK (kind IN ('external', 'summarize_session')),
    scopes      text[]      NOT NULL CHECK (cardinality(scopes) >= 1),
    created_at  timestamptz NOT NULL,
    disabled_at timestamptz,
    deleted_at  timestamptz
);
COMMENT ON TABLE agents IS 'Who acts for a user. A deleted one stays, so that its id in the audit log has a name.';
COMMENT ON COLUMN agents.scopes IS 'What the user allowed; its key and its tasks are good for no more.';
CREATE INDEX agents_by_user ON agents (tenant_id, user_id, id) WHERE deleted_at IS NULL;

ALTER TABLE agents ENABLE ROW LEVEL SECURITY;
ALTER TABLE agents FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON agents TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON agents TO kimberly_system USING (true);
GRANT SELECT ON agents TO kimberly_app;
GRANT SELECT, INSERT ON agents TO kimberly_system;
GRANT UPDATE (disabled_at, deleted_at) ON agents TO kimberly_system;
SELECT make_erasable('agents');

ALTER TABLE api_keys ADD COLUMN agent_id uuid UNIQUE REFERENCES agents (id) ON DELETE CASCADE;
COMMENT ON COLUMN api_keys.agent_id IS 'The agent whose key it is; none: a script''s, which acts as its user.';
GRANT UPDATE (expires_at) ON api_keys TO kimberly_system;

-- The agent that acts in the running transaction, if one does.
CREATE FUNCTION acting_agent() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
    RETURN nullif(current_setting('kimberly.agent_id', true), '')::uuid;

CREATE FUNCTION hides_sensitive() RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE
    RETURN coalesce(current_setting('kimberly.hides_sensitive', true), '') <> '';

-- Has an agent act for the user of the running transaction, to its end. Every transaction of an
-- agent begins with it, so that what the user withdrew holds for the very next one.
CREATE FUNCTION act_as(agent uuid, sees_sensitive boolean) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM set_config('kimberly.agent_id', agent::text, true),
            set_config('kimberly.hides_sensitive', CASE WHEN sees_sensitive THEN '' ELSE 'yes' END,
                       true);
    IF NOT EXISTS (SELECT FROM agents
                    WHERE tenant_id = current_tenant() AND user_id = current_user_id()
                      AND id = agent AND disabled_at IS NULL AND deleted_at IS NULL) THEN
        RAISE EXCEPTION 'the agent is disabled or gone' USING ERRCODE = 'KM004';
    END IF;
    IF NOT consented('memory.agent_access') THEN
        RAISE EXCEPTION 'agents may not act for the user' USING ERRCODE = 'KM003';
    END IF;
END
$$;

ALTER TABLE memories ALTER COLUMN created_by
    SET DEFAULT CASE WHEN acting_agent() IS NULL THEN 'user' ELSE 'agent' END;

-- To an agent without the scope, sensitive memories are not there. What may be seen is cheap to
-- tell for those that are not sensitive: nearly all.
CREATE POLICY seen_by_agents ON memories AS RESTRICTIVE TO kimberly_app
    USING (NOT sensitive OR NOT hides_sensitive());
CREATE POLICY seen_by_agents ON memory_versions AS RESTRICTIVE TO kimberly_app
    USING (NOT sensitive OR NOT hides_sensitive());
CREATE POLICY seen_by_agents ON attachments AS RESTRICTIVE TO kimberly_app
    USING (NOT hides_sensitive()
           OR EXISTS (SELECT FROM memories
                       WHERE memories.tenant_id = attachments.tenant_id
                         AND memories.user_id = attachments.user_id
                         AND memories.id = attachments.memory_id));

-- Requests that make API keys and agents are the system role's, as keys are.
CREATE POLICY known_again ON requests FOR SELECT TO kimberly_system USING (true);
CREATE POLICY claimed ON requests FOR INSERT TO kimberly_system WITH CHECK (true);
GRANT SELECT, INSERT ON requests TO kimberly_system;
