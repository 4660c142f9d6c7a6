-- Meditations that tidy up after scoring, can be tried and undone, and tell what they did.

ALTER TABLE meditations
    ADD COLUMN full_run boolean NOT NULL DEFAULT false,
    ADD COLUMN dry_run  boolean NOT NULL DEFAULT false,
    ADD COLUMN total    bigint  NOT NULL DEFAULT 0 CHECK (total >= 0);
COMMENT ON COLUMN meditations.full_run IS 'Every score is stored anew, not only those that moved.';
COMMENT ON COLUMN meditations.dry_run IS 'It tells what it would do, and changes nothing.';
COMMENT ON COLUMN meditations.total IS 'How many memories there were when it was asked for.';
GRANT INSERT (full_run, dry_run, total) ON meditations TO kimberly_app;

-- One run of each kind at a time: who asks for a real one is not served by one that is dry.
CREATE UNIQUE INDEX meditations_running_once
    ON meditations (user_id, tenant_id, dry_run) NULLS NOT DISTINCT WHERE state = 'running';
DROP INDEX meditations_running;
CREATE INDEX meditations_by_user ON meditations (user_id, id) WHERE user_id IS NOT NULL;

ALTER TABLE meditation_shards
    ADD COLUMN processed bigint NOT NULL DEFAULT 0 CHECK (processed >= 0),
    ADD COLUMN archived  bigint NOT NULL DEFAULT 0 CHECK (archived >= 0),
    ADD COLUMN promoted  bigint NOT NULL DEFAULT 0 CHECK (promoted >= 0),
    ADD COLUMN deleted   bigint NOT NULL DEFAULT 0 CHECK (deleted >= 0);
COMMENT ON COLUMN meditation_shards.score_sum IS 'Of all that were processed, stored or not.';
-- Until now every score was stored.
ALTER TABLE meditation_shards NO FORCE ROW LEVEL SECURITY;
UPDATE meditation_shards SET processed = scored;
ALTER TABLE meditation_shards FORCE ROW LEVEL SECURITY;

CREATE TABLE meditation_users (
    tenant_id     uuid   NOT NULL,
    user_id       uuid   NOT NULL,
    meditation_id uuid   NOT NULL REFERENCES meditations (id) ON DELETE CASCADE,
    archived      bigint NOT NULL DEFAULT 0 CHECK (archived >= 0),
    undone_at     timestamptz,
    PRIMARY KEY (user_id, meditation_id)
);
COMMENT ON TABLE meditation_users IS 'Of whom a meditation archived something, how much, and whether they undid it.';
CREATE INDEX meditation_users_by_run ON meditation_users (meditation_id);

ALTER TABLE meditation_users ENABLE ROW LEVEL SECURITY;
ALTER TABLE meditation_users FORCE  ROW LEVEL SECURITY;
CREATE POLICY own ON meditation_users TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON meditation_users TO kimberly_system USING (true);
GRANT SELECT ON meditation_users TO kimberly_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON meditation_users TO kimberly_system;

-- A user sees the nightly runs that archived something of theirs, but not how many memories of
-- others they looked at.
CREATE POLICY touched ON meditations FOR SELECT TO kimberly_app
    USING (user_id IS NULL AND id IN (SELECT meditation_id FROM meditation_users
                                       WHERE tenant_id = current_tenant()
                                         AND user_id = current_user_id()));
ALTER POLICY own ON meditation_shards
    USING (EXISTS (SELECT FROM meditations
                    WHERE meditations.id = meditation_id AND user_id = current_user_id()));

ALTER TABLE memories ADD COLUMN archived_in uuid;
COMMENT ON COLUMN memories.archived_in IS 'The meditation that archived it, for as long as nobody else had a say in it.';
CREATE INDEX memories_by_meditation ON memories (user_id, archived_in, id)
 WHERE archived_in IS NOT NULL;

-- Every row of a page is scored in one transaction: only if half of the page is free, all of them
-- stay on it and touch no index.
ALTER TABLE memory_scores SET (fillfactor = 50);

-- As in 0008, but for one thing: what the mesh itself took away it gives back, whatever the quota
-- says. Nothing else that the system role does adds to what a user keeps.
CREATE OR REPLACE FUNCTION count_usage(whose_tenant uuid, whose uuid,
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
    IF long_term <= 0 AND permanent <= 0 OR current_user = 'kimberly_system' THEN
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
