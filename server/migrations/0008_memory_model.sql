-- The whole memory: states, scopes, versions, and quotas that are exact whoever writes.

-- Plans and quotas -------------------------------------------------------------------------------

CREATE TABLE plans (
    name             text   PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 32),
    short_term_bytes bigint NOT NULL CHECK (short_term_bytes >= 0),
    long_term_bytes  bigint NOT NULL CHECK (long_term_bytes >= 0),
    permanent_bytes  bigint NOT NULL CHECK (permanent_bytes >= 0),
    vectors          bigint NOT NULL CHECK (vectors >= 0)
);
COMMENT ON TABLE plans IS 'What a user may keep: bytes of content and tags a tier, vectors of all models.';
INSERT INTO plans VALUES
    ('free', 524288, 2097152, 10485760, 100000),
    ('premium', 4194304, 67108864, 268435456, 1000000);

CREATE TABLE subscriptions (
    tenant_id uuid NOT NULL,
    user_id   uuid NOT NULL,
    plan      text NOT NULL REFERENCES plans (name),
    PRIMARY KEY (user_id, tenant_id)
);
COMMENT ON TABLE subscriptions IS 'Which plan a user has; without a row it is the free one.';

ALTER TABLE settings
    ADD COLUMN short_term_bytes   bigint  CHECK (short_term_bytes >= 0),
    ADD COLUMN long_term_bytes    bigint  CHECK (long_term_bytes >= 0),
    ADD COLUMN permanent_bytes    bigint  CHECK (permanent_bytes >= 0),
    ADD COLUMN short_term_hours   integer CHECK (short_term_hours BETWEEN 1 AND 168),
    ADD COLUMN long_term_days     integer CHECK (long_term_days BETWEEN 1 AND 36500),
    ADD COLUMN archive_grace_days integer CHECK (archive_grace_days BETWEEN 1 AND 365);
COMMENT ON COLUMN settings.short_term_bytes IS 'With the next two: quotas below those of the plan. NULL: the plan''s.';
COMMENT ON COLUMN settings.short_term_hours IS 'How long short-term memories live. NULL: as long as the mesh says.';
COMMENT ON COLUMN settings.long_term_days IS 'Unseen for so long, long-term memories are archived. NULL: never.';
COMMENT ON COLUMN settings.archive_grace_days IS 'How long what is archived can be restored. NULL: 30 days.';

CREATE TABLE memory_usage (
    tenant_id       uuid   NOT NULL,
    user_id         uuid   NOT NULL,
    long_term_bytes bigint NOT NULL DEFAULT 0 CHECK (long_term_bytes >= 0),
    permanent_bytes bigint NOT NULL DEFAULT 0 CHECK (permanent_bytes >= 0),
    archived_bytes  bigint NOT NULL DEFAULT 0 CHECK (archived_bytes >= 0),
    long_term_count bigint NOT NULL DEFAULT 0 CHECK (long_term_count >= 0),
    permanent_count bigint NOT NULL DEFAULT 0 CHECK (permanent_count >= 0),
    archived_count  bigint NOT NULL DEFAULT 0 CHECK (archived_count >= 0),
    data_version    bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, tenant_id)
) WITH (fillfactor = 50);
COMMENT ON TABLE memory_usage IS 'What a user keeps, exactly: triggers count in the transaction that writes.';
COMMENT ON COLUMN memory_usage.archived_bytes IS 'Archived memories count against no quota.';
COMMENT ON COLUMN memory_usage.data_version IS 'Another one after every change that a query could tell.';

-- The quotas of a user: what the plan gives and the user did not lower.
CREATE FUNCTION quotas_of(whose_tenant uuid, whose uuid,
                          OUT short_term_bytes bigint, OUT long_term_bytes bigint,
                          OUT permanent_bytes bigint, OUT vectors bigint)
LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT least(plan.short_term_bytes, chosen.short_term_bytes),
           least(plan.long_term_bytes, chosen.long_term_bytes),
           least(plan.permanent_bytes, chosen.permanent_bytes),
           plan.vectors
      FROM plans AS plan
      LEFT JOIN settings AS chosen
        ON chosen.tenant_id = whose_tenant AND chosen.user_id = whose
     WHERE plan.name = coalesce((SELECT subscription.plan
                                   FROM subscriptions AS subscription
                                  WHERE subscription.tenant_id = whose_tenant
                                    AND subscription.user_id = whose), 'free');
END;

-- States, scopes and who did it ------------------------------------------------------------------

ALTER TABLE memories
    ADD COLUMN channels        text[]      NOT NULL DEFAULT '{}' CHECK (cardinality(channels) <= 16),
    ADD COLUMN scope           text        NOT NULL DEFAULT 'private'
                                           CHECK (scope IN ('private', 'shared', 'public')),
    ADD COLUMN sensitive       boolean     NOT NULL DEFAULT false,
    ADD COLUMN sealed          bytea,
    ADD COLUMN protected       boolean     NOT NULL DEFAULT false,
    ADD COLUMN restored        boolean     NOT NULL DEFAULT false,
    ADD COLUMN created_by      text        NOT NULL DEFAULT 'user'
                                           CHECK (created_by IN ('user', 'agent', 'system')),
    ADD COLUMN consent_version bigint,
    ADD COLUMN archived_at     timestamptz,
    ADD COLUMN archived_by     text        CHECK (archived_by IN ('user', 'system')),
    ADD COLUMN delete_after    timestamptz,
    ADD CONSTRAINT memories_archived CHECK ((archived_at IS NULL) = (delete_after IS NULL)
                                        AND (archived_at IS NULL) = (archived_by IS NULL)),
    DROP CONSTRAINT memories_content_check,
    ADD CONSTRAINT memories_content_check CHECK (
        CASE WHEN sealed IS NULL THEN octet_length(content) BETWEEN 1 AND 65536
             ELSE sensitive AND content = '' END);
COMMENT ON COLUMN memories.sealed IS 'The content of a sensitive memory, encrypted; content is empty then.';
COMMENT ON COLUMN memories.restored IS 'The user brought it back: the machine never archives it again.';
COMMENT ON COLUMN memories.consent_version IS 'Of the consent to memory.store that it was written under.';
COMMENT ON COLUMN memories.delete_after IS 'An archived memory is deleted for good after this instant.';

-- An archived memory does not stand in the way of the same words said again.
CREATE UNIQUE INDEX memories_by_active_content
    ON memories (user_id, tier, content_hash, session_id, coalesce(session_position, -1))
 WHERE archived_at IS NULL;
DROP INDEX memories_by_content;
CREATE INDEX memories_by_deletion ON memories (delete_after, user_id, id)
 WHERE archived_at IS NOT NULL;
-- What members of a tenant show each other is little beside what they keep to themselves.
CREATE INDEX memories_by_scope ON memories (tenant_id, id DESC)
 WHERE scope <> 'private' AND archived_at IS NULL;

-- The version of the standing consent of the running transaction's user; NULL: there is none.
CREATE FUNCTION consent_version(asked text) RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE
    RETURN (SELECT CASE WHEN granted THEN version END
              FROM consents
             WHERE tenant_id = current_tenant() AND user_id = current_user_id()
               AND purpose = asked
             ORDER BY version DESC
             LIMIT 1);

-- Versions ---------------------------------------------------------------------------------------

CREATE TABLE memory_versions (
    tenant_id       uuid        NOT NULL,
    user_id         uuid        NOT NULL,
    memory_id       uuid        NOT NULL,
    version         bigint      NOT NULL CHECK (version >= 1),
    tier            text        NOT NULL,
    content         text        NOT NULL,
    sealed          bytea,
    tags            text[]      NOT NULL,
    channels        text[]      NOT NULL,
    scope           text        NOT NULL,
    sensitive       boolean     NOT NULL,
    protected       boolean     NOT NULL,
    speaker         text        NOT NULL,
    occurred_at     timestamptz NOT NULL,
    size_bytes      integer     NOT NULL,
    content_hash    bytea       NOT NULL,
    archived_at     timestamptz,
    updated_at      timestamptz NOT NULL,
    PRIMARY KEY (user_id, memory_id, version),
    FOREIGN KEY (user_id, memory_id) REFERENCES memories (user_id, id) ON DELETE CASCADE
);
COMMENT ON TABLE memory_versions IS 'What memories were before they changed; they go with the memory.';

CREATE FUNCTION keep_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO memory_versions (tenant_id, user_id, memory_id, version, tier, content, sealed,
                                 tags, channels, scope, sensitive, protected, speaker,
                                 occurred_at, size_bytes, content_hash, archived_at, updated_at)
    VALUES (old.tenant_id, old.user_id, old.id, old.version, old.tier, old.content, old.sealed,
            old.tags, old.channels, old.scope, old.sensitive, old.protected, old.speaker,
            old.occurred_at, old.size_bytes, old.content_hash, old.archived_at, old.updated_at);
    RETURN NULL;
END
$$;

-- Usage ------------------------------------------------------------------------------------------

-- Adds to what a user keeps. The row is locked until the transaction ends, so that of two writers
-- who fit only one by one, one is refused: with KM001, saying what is used and what is allowed.
-- Long-term memories may overrun by a fifth until the next meditation tidies up. Everything else
-- that a transaction locks, it locks before this row; whoever adds nothing touches it last.
CREATE FUNCTION count_usage(whose_tenant uuid, whose uuid,
                            long_term bigint, permanent bigint, archived bigint,
                            long_terms bigint, permanents bigint, archiveds bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    usage   memory_usage;
    quota   record;
    counted record;
    share   integer;
BEGIN
    LOOP
        UPDATE memory_usage
           SET long_term_bytes = long_term_bytes + long_term,
               permanent_bytes = permanent_bytes + permanent,
               archived_bytes  = archived_bytes + archived,
               long_term_count = long_term_count + long_terms,
               permanent_count = permanent_count + permanents,
               archived_count  = archived_count + archiveds,
               data_version    = data_version + 1
         WHERE tenant_id = whose_tenant AND user_id = whose
        RETURNING * INTO usage;
        EXIT WHEN FOUND;
        INSERT INTO memory_usage (tenant_id, user_id) VALUES (whose_tenant, whose)
            ON CONFLICT DO NOTHING;
    END LOOP;
    IF long_term <= 0 AND permanent <= 0 THEN
        RETURN;
    END IF;
    quota := quotas_of(whose_tenant, whose);
    FOR counted IN VALUES
        ('long_term', usage.long_term_bytes, long_term, quota.long_term_bytes,
         quota.long_term_bytes * 12 / 10),
        ('permanent', usage.permanent_bytes, permanent, quota.permanent_bytes,
         quota.permanent_bytes)
    LOOP
        CONTINUE WHEN counted.column3 <= 0;
        IF counted.column2 > counted.column5 THEN
            RAISE EXCEPTION 'over quota' USING
                ERRCODE = 'KM001',
                DETAIL = json_build_object('tier', counted.column1,
                                           'used', counted.column2 - counted.column3,
                                           'limit', counted.column4,
                                           'room', counted.column5 - counted.column2
                                                   + counted.column3);
        END IF;
        FOREACH share IN ARRAY ARRAY[80, 100] LOOP
            IF counted.column2 * 100 >= counted.column4 * share
               AND (counted.column2 - counted.column3) * 100 < counted.column4 * share THEN
                INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource)
                VALUES (uuidv7(), whose_tenant, whose, 'system', 'quota.threshold',
                        format('usage/%s/%s', counted.column1, share));
            END IF;
        END LOOP;
    END LOOP;
END
$$;

CREATE FUNCTION count_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM count_usage(tenant_id, user_id,
                        coalesce(sum(size_bytes) FILTER (WHERE tier = 'long_term'
                                                           AND archived_at IS NULL), 0),
                        coalesce(sum(size_bytes) FILTER (WHERE tier = 'permanent'
                                                           AND archived_at IS NULL), 0),
                        coalesce(sum(size_bytes) FILTER (WHERE archived_at IS NOT NULL), 0),
                        count(*) FILTER (WHERE tier = 'long_term' AND archived_at IS NULL),
                        count(*) FILTER (WHERE tier = 'permanent' AND archived_at IS NULL),
                        count(*) FILTER (WHERE archived_at IS NOT NULL))
       FROM inserted
      GROUP BY tenant_id, user_id;
    RETURN NULL;
END
$$;

CREATE FUNCTION count_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM count_usage(tenant_id, user_id,
                        -coalesce(sum(size_bytes) FILTER (WHERE tier = 'long_term'
                                                            AND archived_at IS NULL), 0),
                        -coalesce(sum(size_bytes) FILTER (WHERE tier = 'permanent'
                                                            AND archived_at IS NULL), 0),
                        -coalesce(sum(size_bytes) FILTER (WHERE archived_at IS NOT NULL), 0),
                        -count(*) FILTER (WHERE tier = 'long_term' AND archived_at IS NULL),
                        -count(*) FILTER (WHERE tier = 'permanent' AND archived_at IS NULL),
                        -count(*) FILTER (WHERE archived_at IS NOT NULL))
       FROM deleted
      GROUP BY tenant_id, user_id;
    RETURN NULL;
END
$$;

CREATE FUNCTION count_updated() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    was text := CASE WHEN old.archived_at IS NULL THEN old.tier ELSE 'archived' END;
    becomes text := CASE WHEN new.archived_at IS NULL THEN new.tier ELSE 'archived' END;
BEGIN
    PERFORM count_usage(
        new.tenant_id, new.user_id,
        new.size_bytes * (becomes = 'long_term')::int - old.size_bytes * (was = 'long_term')::int,
        new.size_bytes * (becomes = 'permanent')::int - old.size_bytes * (was = 'permanent')::int,
        new.size_bytes * (becomes = 'archived')::int - old.size_bytes * (was = 'archived')::int,
        (becomes = 'long_term')::int - (was = 'long_term')::int,
        (becomes = 'permanent')::int - (was = 'permanent')::int,
        (becomes = 'archived')::int - (was = 'archived')::int);
    RETURN NULL;
END
$$;

CREATE TRIGGER memories_inserted AFTER INSERT ON memories
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION count_inserted();
CREATE TRIGGER memories_deleted AFTER DELETE ON memories
    REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT EXECUTE FUNCTION count_deleted();
-- By row, so that the terms of neighbours, which change without a version, cost nothing here.
CREATE TRIGGER memories_changed AFTER UPDATE ON memories
    FOR EACH ROW WHEN (old.version IS DISTINCT FROM new.version)
    EXECUTE FUNCTION keep_version();
CREATE TRIGGER memories_counted AFTER UPDATE ON memories
    FOR EACH ROW WHEN (old.version IS DISTINCT FROM new.version)
    EXECUTE FUNCTION count_updated();

-- What is there already counts; the owner of the tables sees it only like this.
ALTER TABLE memories NO FORCE ROW LEVEL SECURITY;
INSERT INTO memory_usage (tenant_id, user_id, long_term_bytes, permanent_bytes,
                          long_term_count, permanent_count)
SELECT tenant_id, user_id,
       coalesce(sum(size_bytes) FILTER (WHERE tier = 'long_term'), 0),
       coalesce(sum(size_bytes) FILTER (WHERE tier = 'permanent'), 0),
       count(*) FILTER (WHERE tier = 'long_term'),
       count(*) FILTER (WHERE tier = 'permanent')
  FROM memories
 GROUP BY tenant_id, user_id;
ALTER TABLE memories FORCE ROW LEVEL SECURITY;

-- Who may --------------------------------------------------------------------------------------

ALTER TABLE subscriptions   ENABLE ROW LEVEL SECURITY;
ALTER TABLE subscriptions   FORCE  ROW LEVEL SECURITY;
ALTER TABLE memory_usage    ENABLE ROW LEVEL SECURITY;
ALTER TABLE memory_usage    FORCE  ROW LEVEL SECURITY;
ALTER TABLE memory_versions ENABLE ROW LEVEL SECURITY;
ALTER TABLE memory_versions FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON subscriptions TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON memory_usage TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON memory_versions TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON subscriptions   TO kimberly_system USING (true);
CREATE POLICY system ON memory_usage    TO kimberly_system USING (true);
CREATE POLICY system ON memory_versions TO kimberly_system USING (true);

GRANT SELECT ON plans TO kimberly_app, kimberly_system;
GRANT SELECT ON subscriptions TO kimberly_app;
GRANT SELECT, INSERT, UPDATE ON subscriptions TO kimberly_system;
GRANT SELECT, INSERT, UPDATE ON memory_usage TO kimberly_app, kimberly_system;
GRANT SELECT, INSERT ON memory_versions TO kimberly_app, kimberly_system;
-- Retention archives and deletes what belongs to many users.
GRANT UPDATE, DELETE ON memories TO kimberly_system;
