-- Users who are erased: that they are, and that nothing of theirs comes back.

CREATE TABLE erasures (
    id            uuid        PRIMARY KEY,
    tenant_id     uuid        NOT NULL,
    user_id       uuid        NOT NULL UNIQUE,
    receipt_id    uuid        NOT NULL UNIQUE,
    state         text        NOT NULL DEFAULT 'erasing'
                              CHECK (state IN ('erasing', 'erased', 'confirmed')),
    store         text        NOT NULL DEFAULT 'postgres'
                              CHECK (store IN ('postgres', 'objects', 'uploads', 'valkey')),
    place         text        NOT NULL DEFAULT '',
    found         bigint      NOT NULL DEFAULT 0 CHECK (found >= 0),
    rounds        integer     NOT NULL DEFAULT 0 CHECK (rounds >= 0),
    removed       jsonb       NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(removed) = 'object'),
    requested_at  timestamptz NOT NULL DEFAULT now(),
    archived_at   timestamptz,
    erased_at     timestamptz,
    confirm_after timestamptz,
    confirmed_at  timestamptz,
    CHECK ((state = 'erasing') = (erased_at IS NULL)),
    CHECK ((state = 'confirmed') = (confirmed_at IS NOT NULL))
);
COMMENT ON TABLE erasures IS 'Who was erased. A row stays for good: a token or a backup that comes back finds it.';
COMMENT ON COLUMN erasures.receipt_id IS 'Made by chance alone: who knows it may read how far the erasure is.';
COMMENT ON COLUMN erasures.store IS 'With place: where the round that goes through all stores is.';
COMMENT ON COLUMN erasures.found IS 'How much this round has found. One that finds nothing is the last.';
COMMENT ON COLUMN erasures.rounds IS 'How many rounds have been completed.';
COMMENT ON COLUMN erasures.archived_at IS 'When S3 took the signed word that a restored backup is erased by; nothing is removed before.';
COMMENT ON COLUMN erasures.confirm_after IS 'When every upload that was allowed before has lapsed.';
CREATE INDEX erasures_by_time ON erasures (requested_at);
CREATE INDEX erasures_unarchived ON erasures (id) WHERE archived_at IS NULL;

ALTER TABLE erasures ENABLE ROW LEVEL SECURITY;
ALTER TABLE erasures FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON erasures TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON erasures TO kimberly_system USING (true);
GRANT SELECT (tenant_id, user_id) ON erasures TO kimberly_app;
GRANT SELECT, INSERT, UPDATE ON erasures TO kimberly_system;

-- Names a user where their writers and their erasure meet.
CREATE FUNCTION erasure_lock(whose uuid) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN hashtextextended('erasure/' || whose::text, 0);

CREATE FUNCTION is_erased(whose_tenant uuid, whose uuid) RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN EXISTS (SELECT FROM erasures WHERE tenant_id = whose_tenant AND user_id = whose);

-- Whoever writes holds the lock shared until the commit, and an erasure is asked for under it
-- alone: it waits for those who write, and those who come then find it.
CREATE FUNCTION refuse_erased(whose_tenant uuid, whose uuid) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(erasure_lock(whose));
    -- A statement of its own: it sees what was committed while the lock was waited for.
    IF is_erased(whose_tenant, whose) THEN
        RAISE EXCEPTION 'the user is erased' USING ERRCODE = 'KM002';
    END IF;
END
$$;

-- The same for the user of the running transaction. Every write of a user pays for it, and would
-- pay twice as much for a call of the function above.
CREATE FUNCTION refuse_insert_by_erased() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(erasure_lock(current_user_id()));
    IF EXISTS (SELECT FROM erasures WHERE user_id = current_user_id()) THEN
        RAISE EXCEPTION 'the user is erased' USING ERRCODE = 'KM002';
    END IF;
    RETURN NULL;
END
$$;

CREATE FUNCTION refuse_insert_for_erased() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM refuse_erased(new.tenant_id, new.user_id);
    RETURN new;
END
$$;

-- Lets the system role remove the rows of users who are erased, and those only unless it could
-- before. Each table with a user_id needs it.
CREATE FUNCTION make_erasable(which regclass, owner_column text DEFAULT 'user_id') RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    whose text := format('is_erased(tenant_id, %I)', owner_column);
BEGIN
    IF NOT has_table_privilege('kimberly_system', which, 'DELETE') THEN
        EXECUTE format('CREATE POLICY erased_only ON %s AS RESTRICTIVE FOR DELETE '
                       'TO kimberly_system USING (%s)', which, whose);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = which AND polname = 'system') THEN
        EXECUTE format('CREATE POLICY erasing ON %s TO kimberly_system USING (%s)', which, whose);
    END IF;
    EXECUTE format('GRANT SELECT, DELETE ON %s TO kimberly_system', which);
END
$$;

SELECT make_erasable(class.oid, attribute.attname)
  FROM pg_class AS class
  JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid
 WHERE class.relnamespace = 'public'::regnamespace AND class.relkind = 'r'
   AND attname = CASE relname WHEN 'users' THEN 'id' ELSE 'user_id' END
   AND relname NOT IN ('audit_events', 'erasures');

-- Whatever a user writes is told in its transaction, so that this alone stops all of it. Jobs are
-- asked for by workers too.
CREATE TRIGGER refuse_erased BEFORE INSERT ON jobs FOR EACH STATEMENT
    WHEN (current_user_id() IS NOT NULL) EXECUTE FUNCTION refuse_insert_by_erased();
CREATE TRIGGER refuse_erased BEFORE INSERT ON audit_events FOR EACH STATEMENT
    WHEN (current_user_id() IS NOT NULL) EXECUTE FUNCTION refuse_insert_by_erased();
-- Whoever logs in is nobody's transaction yet.
CREATE TRIGGER refuse_erased_user BEFORE INSERT ON sessions FOR EACH ROW
    EXECUTE FUNCTION refuse_insert_for_erased();

-- As before, but for one thing: what is removed of the erased is not counted, since what it was
-- counted in may be gone already.
CREATE OR REPLACE FUNCTION count_deleted() RETURNS trigger LANGUAGE plpgsql AS $$
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
      GROUP BY tenant_id, user_id
     HAVING NOT is_erased(tenant_id, user_id);
    RETURN NULL;
END
$$;
